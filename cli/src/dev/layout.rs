//! What the fleet of a data directory is: who, and on which ports; kept in `dev.json`.

use std::net::SocketAddr;
use std::path::Path;

use serde::{Deserialize, Serialize};

use super::ports::{Ports, is_free};
use super::{DevError, write_whole};
use crate::exit::CliError;

/// What the command line asks for.
#[derive(Debug)]
pub(super) struct Asked {
    /// Control nodes; none: as before, or 1.
    pub(super) control: Option<usize>,
    /// Balancers.
    pub(super) balancers: u16,
    /// Workers.
    pub(super) workers: u16,
}

/// The fleet as it is kept. Fewer than it has may run; what does not keeps its place.
#[derive(Debug, Serialize, Deserialize)]
pub(super) struct Fleet {
    schema_version: u32,
    /// Whether the cluster was founded.
    pub(super) initialised: bool,
    /// The control nodes, `c1` first.
    pub(super) control: Vec<Control>,
    /// Balancers, `b1` first.
    pub(super) balancers: Vec<Balancer>,
    /// Workers, `w1` first.
    pub(super) workers: Vec<Worker>,
    /// How many of the workers run.
    #[serde(skip)]
    running_workers: usize,
}

/// A control node's addresses.
#[derive(Debug, Serialize, Deserialize)]
pub(super) struct Control {
    pub(super) quic: SocketAddr,
    pub(super) admin: SocketAddr,
}

/// A balancer's own addresses; that for clients is the command line's.
#[derive(Debug, Serialize, Deserialize)]
pub(super) struct Balancer {
    pub(super) admin: SocketAddr,
}

/// The addresses of an agent and its engine.
#[derive(Debug, Serialize, Deserialize)]
pub(super) struct Worker {
    pub(super) quic: SocketAddr,
    pub(super) admin: SocketAddr,
    pub(super) engine: SocketAddr,
}

impl Fleet {
    /// Reads the fleet of a data directory, or plans a new one, with all that was asked for.
    pub(super) fn open(dir: &Path, asked: &Asked) -> Result<Self, CliError> {
        let mut fleet = match read(dir)? {
            Some(fleet) => fleet,
            None => Self {
                schema_version: VERSION,
                initialised: false,
                control: vec![],
                balancers: vec![],
                workers: vec![],
                running_workers: 0,
            },
        };
        fleet.check_size(dir, asked)?;
        fleet.complete(asked)?;
        fleet.running_workers = usize::from(asked.workers);
        Ok(fleet)
    }

    /// Keeps it.
    pub(super) fn save(&self, dir: &Path) -> Result<(), CliError> {
        let text = serde_json::to_string_pretty(self).expect("plain data serialises");
        write_whole(&dir.join(FILE), &(text + "\n"))
    }

    /// The addresses that everybody is given.
    pub(super) fn control_addresses(&self) -> Vec<String> {
        self.control.iter().map(|c| c.quic.to_string()).collect()
    }

    /// How many workers run.
    pub(super) fn workers_asked(&self) -> usize {
        self.running_workers
    }

    /// The workers that run.
    pub(super) fn running_workers(&self) -> &[Worker] {
        &self.workers[..self.running_workers]
    }

    /// Their names.
    pub(super) fn worker_names(&self) -> Vec<String> {
        (1..=self.running_workers)
            .map(|n| format!("w{n}"))
            .collect()
    }

    /// Names and admin addresses of the first `count` balancers.
    pub(super) fn balancer_admins(&self, count: usize) -> Vec<(String, SocketAddr)> {
        let named = (1..).zip(&self.balancers[..count]);
        named.map(|(n, b)| (format!("b{n}"), b.admin)).collect()
    }

    fn check_size(&self, dir: &Path, asked: &Asked) -> Result<(), DevError> {
        match asked.control {
            Some(asked) if !self.control.is_empty() && self.control.len() != asked => {
                Err(DevError::OtherSize {
                    dir: dir.into(),
                    found: self.control.len(),
                    asked,
                })
            }
            Some(_) | None => Ok(()),
        }
    }

    /// Adds whom there is no place for yet, and moves who may move from ports that others took.
    fn complete(&mut self, asked: &Asked) -> Result<(), DevError> {
        let mut ports = Ports::default();
        for (n, node) in (1..).zip(&mut self.control) {
            if !is_free(node.quic) {
                return Err(DevError::ControlPort {
                    name: format!("c{n}"),
                    address: node.quic,
                });
            }
            ports.reserve(node.quic);
        }
        let movable = self.control.iter_mut().map(|c| &mut c.admin);
        let movable = movable.chain(self.balancers.iter_mut().map(|b| &mut b.admin));
        let movable = movable.chain(
            self.workers
                .iter_mut()
                .flat_map(|w| [&mut w.quic, &mut w.admin, &mut w.engine]),
        );
        for address in movable {
            if is_free(*address) {
                ports.reserve(*address);
            } else {
                *address = ports.free()?;
            }
        }
        if self.control.is_empty() {
            for _ in 0..asked.control.unwrap_or(1) {
                let (quic, admin) = (ports.free()?, ports.free()?);
                self.control.push(Control { quic, admin });
            }
        }
        while self.balancers.len() < usize::from(asked.balancers) {
            let admin = ports.free()?;
            self.balancers.push(Balancer { admin });
        }
        while self.workers.len() < usize::from(asked.workers) {
            let (quic, admin, engine) = (ports.free()?, ports.free()?, ports.free()?);
            self.workers.push(Worker {
                quic,
                admin,
                engine,
            });
        }
        Ok(())
    }
}

fn read(dir: &Path) -> Result<Option<Fleet>, CliError> {
    let path = dir.join(FILE);
    let text = match std::fs::read_to_string(&path) {
        Ok(text) => text,
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(None),
        Err(error) => return Err(CliError::File { path, error }),
    };
    let problem = match serde_json::from_str::<Fleet>(&text) {
        Ok(fleet) if fleet.schema_version == VERSION && !fleet.control.is_empty() => {
            return Ok(Some(fleet));
        }
        Ok(fleet) => format!(
            "its schema_version is {}, not {VERSION}",
            fleet.schema_version
        ),
        Err(error) => error.to_string(),
    };
    Err(DevError::Layout { path, problem }.into())
}

const FILE: &str = "dev.json";
const VERSION: u32 = 1;

#[cfg(test)]
mod tests {
    use super::*;

    fn asked(control: Option<usize>, balancers: u16, workers: u16) -> Asked {
        Asked {
            control,
            balancers,
            workers,
        }
    }

    #[test]
    fn a_directory_keeps_its_fleet_and_only_grows() {
        let dir = tempfile::tempdir().unwrap();
        let first = Fleet::open(dir.path(), &asked(Some(3), 1, 2)).unwrap();
        first.save(dir.path()).unwrap();
        let second = Fleet::open(dir.path(), &asked(None, 2, 1)).unwrap();
        assert_eq!(second.control_addresses(), first.control_addresses());
        assert_eq!((second.balancers.len(), second.workers.len()), (2, 2));
        assert_eq!(second.worker_names(), ["w1"]);
        let error = Fleet::open(dir.path(), &asked(Some(1), 1, 2)).unwrap_err();
        assert!(
            error.to_string().contains("3 control nodes, not 1"),
            "{error}"
        );
    }

    #[test]
    fn a_record_that_is_none_is_named() {
        let dir = tempfile::tempdir().unwrap();
        std::fs::write(dir.path().join(FILE), "{}").unwrap();
        let error = Fleet::open(dir.path(), &asked(None, 1, 1)).unwrap_err();
        assert!(error.to_string().contains("dev.json"), "{error}");
    }
}
