"""Making other libraries take the backend's name where they know backends from a closed list."""

from __future__ import annotations


def allow_in_accelerate() -> None:
    """Let Hugging Face accelerate, and with it transformers' ``Trainer``, take ``"lnfold"`` for a Dynamo backend.

    accelerate checks names against an enumeration of the backends its authors knew. This adds ours; calling it again
    changes nothing.

    Raises:
        ImportError: if accelerate is not installed.

    Example:
        >>> import lncompile
        >>> lncompile.allow_in_accelerate()
        >>> arguments = TrainingArguments(..., torch_compile=True, torch_compile_backend="lnfold")
    """
    from accelerate.utils import DynamoBackend

    name = "LNFOLD"
    if name in DynamoBackend._value2member_map_:
        return
    # Enumerations are closed: this is what the class body does for each of its members.
    member = str.__new__(DynamoBackend, name)
    member._name_ = member._value_ = name
    DynamoBackend._member_map_[name] = DynamoBackend._value2member_map_[name] = member
    DynamoBackend._member_names_.append(name)
