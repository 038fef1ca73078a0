//! Beside each engine: register, admit, carry, report.
