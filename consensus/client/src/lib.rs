//! Finding the leader, renewing, watching and resuming.
