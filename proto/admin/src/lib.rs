//! The admin side of a process: health, metrics and logs.
