//! The leader's loop: what the control plane does by itself.
