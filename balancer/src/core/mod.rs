//! What decides, pure: no clock, socket or task.

pub(crate) mod auth;
pub(crate) mod dispatch;
pub mod error;
pub(crate) mod head;
pub(crate) mod lengths;
pub(crate) mod limits;
pub(crate) mod receipts;
pub(crate) mod request_id;
pub(crate) mod retry;
pub(crate) mod rotation;
pub(crate) mod shadows;
pub(crate) mod suspects;
