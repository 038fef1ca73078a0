//! How we know it works: emulated engine, traces and replay.
