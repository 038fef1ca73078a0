//! Where an engine publishes what its cache holds: sockets of this host, and no others.
//!
//! They hand every prompt and every scope's salt to whoever connects.

use std::str::FromStr;

/// An end of a socket, on this host.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct LocalEndpoint {
    /// As ZeroMQ writes it.
    address: String,
    /// The agent listens, and the engine connects.
    listens: bool,
}

impl LocalEndpoint {
    /// As ZeroMQ writes it.
    pub(super) fn address(&self) -> &str {
        &self.address
    }

    /// Whether the agent is to listen there.
    pub(super) const fn listens(&self) -> bool {
        self.listens
    }
}

impl std::fmt::Display for LocalEndpoint {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let mark = if self.listens { "@" } else { "" };
        write!(f, "{mark}{}", self.address)
    }
}

/// What was given is no socket of this host.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error(
    "{0:?} is no socket of this host: give ipc://PATH or tcp://127.0.0.1:PORT, with @ in front where the engine connects and the agent listens; events of a cache are all of its prompts, and do not leave the host"
)]
pub struct EndpointError(String);

impl FromStr for LocalEndpoint {
    type Err = EndpointError;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let wrong = || EndpointError(text.chars().take(200).collect());
        let (listens, address) = match text.strip_prefix('@') {
            Some(address) => (true, address),
            None => (false, text),
        };
        let local = match address.split_once("://") {
            Some(("ipc", path)) => !path.is_empty(),
            Some(("tcp", authority)) => {
                let (host, port) = authority.rsplit_once(':').ok_or_else(wrong)?;
                is_loopback(host) && port.parse::<u16>().is_ok_and(|port| port > 0)
            }
            Some(_) | None => false,
        };
        if !local {
            return Err(wrong());
        }
        Ok(Self {
            address: address.to_owned(),
            listens,
        })
    }
}

fn is_loopback(host: &str) -> bool {
    let host = host
        .strip_prefix('[')
        .and_then(|h| h.strip_suffix(']'))
        .unwrap_or(host);
    host == "localhost"
        || host
            .parse::<std::net::IpAddr>()
            .is_ok_and(|address| address.is_loopback())
}

/// The sockets of one engine.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Sources {
    /// Where its events come.
    pub events: LocalEndpoint,
    /// Where it tells them again.
    pub replay: Option<LocalEndpoint>,
}

/// What an engine says of its sockets.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Discovered {
    /// It publishes nothing.
    None,
    /// It does, here; `exposed`: to other hosts as well.
    At { sources: Sources, exposed: bool },
    /// It does, where the agent does not go.
    Unusable(String),
}

/// Reads vLLM's `/kv_event_sources`, of an engine that is on this host or not.
pub(super) fn discovered(document: &[u8], on_this_host: bool) -> Discovered {
    #[derive(serde::Deserialize)]
    struct Source {
        #[serde(default)]
        enable_kv_cache_events: bool,
        #[serde(default)]
        publisher: Option<String>,
        #[serde(default)]
        endpoint: String,
        #[serde(default)]
        replay_endpoint: Option<String>,
    }
    let ranks: Result<std::collections::BTreeMap<String, Source>, _> =
        serde_json::from_slice(document);
    let Ok(mut ranks) = ranks else {
        return Discovered::Unusable("/kv_event_sources is not understood".into());
    };
    ranks.retain(|_, source| {
        source.enable_kv_cache_events && source.publisher.as_deref() == Some("zmq")
    });
    let several = ranks.len() > 1;
    let Some((_, source)) = ranks.pop_first() else {
        return Discovered::None;
    };
    if several {
        return Discovered::Unusable("several data-parallel ranks have a cache each".into());
    }
    if !on_this_host {
        return Discovered::Unusable("the engine is not at a loopback address".into());
    }
    // A concrete address of events is where the engine connects; it always listens for replays.
    let (events, exposed) = endpoint(&source.endpoint, true);
    let replay = source.replay_endpoint.filter(|replay| !replay.is_empty());
    let replay = replay.map(|replay| endpoint(&replay, false));
    let exposed = exposed || replay.as_ref().is_some_and(|(_, exposed)| *exposed);
    let replay = replay.map(|(replay, _)| replay.parse()).transpose();
    match (events.parse(), replay) {
        (Ok(events), Ok(replay)) => Discovered::At {
            sources: Sources { events, replay },
            exposed,
        },
        (Err(problem), _) | (_, Err(problem)) => Discovered::Unusable(problem.to_string()),
    }
}

/// From the engine's end of a socket to the agent's, and whether others can reach it.
fn endpoint(text: &str, connects: bool) -> (String, bool) {
    let authority = text.strip_prefix("tcp://").and_then(|a| a.rsplit_once(':'));
    match authority {
        Some(("*" | "0.0.0.0" | "::" | "[::]", port)) => (format!("tcp://127.0.0.1:{port}"), true),
        Some(_) if connects => (format!("@{text}"), false),
        Some(_) | None => (text.to_owned(), false),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sockets_of_other_hosts_are_refused() {
        for good in [
            "ipc:///run/vllm/kv.sock",
            "tcp://127.0.0.1:5557",
            "tcp://localhost:5557",
            "tcp://[::1]:5557",
            "@tcp://127.0.0.1:5557",
        ] {
            assert_eq!(good.parse::<LocalEndpoint>().unwrap().to_string(), good);
        }
        for bad in [
            "",
            "ipc://",
            "127.0.0.1:5557",
            "tcp://*:5557",
            "tcp://10.0.0.7:5557",
            "tcp://gpu7:5557",
            "tcp://127.0.0.1",
            "tcp://127.0.0.1:0",
            "tcp://127.0.0.1.evil.example:1",
            "inproc://x",
        ] {
            assert!(bad.parse::<LocalEndpoint>().is_err(), "{bad}");
        }
    }

    fn check(document: &str, expected: &str) {
        let said = match discovered(document.as_bytes(), true) {
            Discovered::None => "none".to_owned(),
            Discovered::At { sources, exposed } => {
                let replay = sources.replay.map(|replay| replay.to_string());
                format!(
                    "{} {} {exposed}",
                    sources.events,
                    replay.unwrap_or_default()
                )
            }
            Discovered::Unusable(problem) => problem,
        };
        assert!(said.starts_with(expected), "{document}: {said}");
    }

    #[test]
    fn an_engine_says_where_its_events_are() {
        // As recorded from vLLM 0.32.0.
        let recorded = r#"{"0":{"enable_kv_cache_events":true,"publisher":"zmq","endpoint":"tcp://*:9103","replay_endpoint":"tcp://127.0.0.1:10103","buffer_steps":1000,"hwm":100000,"max_queue_size":100000,"topic":"kv@tiny"}}"#;
        check(recorded, "tcp://127.0.0.1:9103 tcp://127.0.0.1:10103 true");
        let other = |endpoint: &str, replay: &str| {
            format!(
                r#"{{"0":{{"enable_kv_cache_events":true,"publisher":"zmq","endpoint":"{endpoint}","replay_endpoint":{replay}}}}}"#
            )
        };
        check(
            &other("ipc:///a", "\"ipc:///b\""),
            "ipc:///a ipc:///b false",
        );
        check(
            &other("tcp://127.0.0.1:1", "null"),
            "@tcp://127.0.0.1:1  false",
        );
        check(
            &other("tcp://10.0.0.1:1", "null"),
            "\"@tcp://10.0.0.1:1\" is no socket",
        );
        check(
            &other("ipc:///a", "\"tcp://10.0.0.1:1\""),
            "\"tcp://10.0.0.1:1\" is no socket",
        );
        check(
            r#"{"0":{"enable_kv_cache_events":false,"publisher":"null"}}"#,
            "none",
        );
        check("{}", "none");
        check("[]", "/kv_event_sources is not understood");
        let two = recorded.replace(
            "}}",
            r#"},"1":{"enable_kv_cache_events":true,"publisher":"zmq","endpoint":"tcp://*:1"}}"#,
        );
        check(&two, "several data-parallel ranks");
        let elsewhere = discovered(recorded.as_bytes(), false);
        assert!(matches!(elsewhere, Discovered::Unusable(_)));
    }
}
