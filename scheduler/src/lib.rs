//! All that decides, pure: views, waits, bookings, policies.
