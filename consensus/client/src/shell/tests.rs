//! The shell against small control nodes over the real link.
