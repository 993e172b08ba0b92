"""Errors a user can mend: each message says what was found, what was expected and what to do next.

Anything else that escapes is a bug and keeps its traceback. The command line prints these as one line and exits 1.
"""


class FastVLMError(Exception):
    """Base of every error that the user, not the developer, can mend."""


class ConfigError(FastVLMError):
    """A config.json is missing, malformed, or describes something that is not FastVLM."""


class CheckpointError(FastVLMError):
    """Weights or tokenizer files are missing, damaged, or do not fit the config."""


class ImageError(FastVLMError):
    """An image cannot be fetched, read or decoded."""


class VideoError(FastVLMError):
    """A video, a camera or a screen cannot be opened or read."""


class HubError(FastVLMError):
    """A model is neither in the cache nor reachable on the hub."""


class OptionError(FastVLMError):
    """An option's value is out of range or options contradict each other."""


class ContextError(OptionError):
    """A prompt and its longest answer do not fit into the model's context."""


class ConversationError(FastVLMError):
    """A saved conversation cannot be read or written."""


class FastVLMWarning(UserWarning):
    """What a user should know though the work goes on."""
