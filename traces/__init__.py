"""What the router chose: recorded and synthetic routing traces."""

from traces.errors import InputError, unknown_name
from traces.schema import NOT_ROUTED, SCHEMA_VERSION, Phase, Trace, TraceError, TraceHeader

__all__ = [
    "NOT_ROUTED",
    "SCHEMA_VERSION",
    "InputError",
    "Phase",
    "Trace",
    "TraceError",
    "TraceHeader",
    "unknown_name",
]
