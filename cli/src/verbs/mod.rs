//! The operators' verbs: one file each, which declares its options, asks, and prints.

pub(crate) mod ask;
pub(crate) mod audit;
pub(crate) mod ca;
pub(crate) mod check;
pub(crate) mod compare;
pub(crate) mod config;
pub(crate) mod docs;
pub(crate) mod explain;
pub(crate) mod init;
pub(crate) mod keys;
pub(crate) mod members;
pub(crate) mod operate;
pub(crate) mod raft;
pub(crate) mod replay;
pub(crate) mod sim;
pub(crate) mod status;
pub(crate) mod top;
pub(crate) mod workers;
