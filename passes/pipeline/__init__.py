"""The pipeline: named passes in one list (``order``), what each is (``deciding``, ``rewriting``), what runs them."""
