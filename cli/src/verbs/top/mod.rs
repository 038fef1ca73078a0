//! `forebay top`: a live view of the fleet in the terminal.

mod draw;
mod scene;

use std::collections::BTreeMap;
use std::io::IsTerminal as _;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use clap::Args;
use ratatui::crossterm::event::{self, Event, KeyCode, KeyEvent, KeyEventKind, KeyModifiers};

use super::ask::Asked;
use crate::context::{ContextArgs, Urls};
use crate::exit::{CliError, Exit};
use crate::look;
use crate::output::result;
use scene::{Scene, Seen, Sort};

/// Options of `forebay top`.
#[derive(Debug, Args)]
#[command(
    after_help = "Keys: q quits; the arrows up and down move in the list of workers, left and right choose the column that it is sorted by, r turns the order round.\n\nSTATE is what the facts say, or how a balancer sees the worker if they cannot be read; RUN, QUEUE, KV and TPOT are the worker's newest report as a balancer has it (KV: the share of its cache that requests use; TPOT: from token to token at present, by its latency model); TTFT is the median from slot to first byte since its agent started; HIT the share of prompt tokens that were cached, since the balancers started. Processes are those of the tables in the context file, as for `forebay check`.\n\nExits with 7 when nothing answers (--once)."
)]
pub(crate) struct TopArgs {
    /// Print one frame as text, and end.
    #[arg(long)]
    once: bool,
    /// Seconds between two looks.
    #[arg(long, value_name = "SECONDS", default_value_t = 1,
          value_parser = clap::value_parser!(u64).range(1..=60))]
    interval: u64,
    #[command(flatten)]
    context: ContextArgs,
}

/// For each page of a process, and for the control plane.
const LOOK_TIME: Duration = Duration::from_millis(1_500);
/// Keys are answered within this.
const KEYS: Duration = Duration::from_millis(100);
/// A frame of one print is this wide, as terminals are at least.
const WIDTH: u16 = 80;

/// Runs `forebay top`.
pub(crate) fn run(args: &TopArgs) -> Result<(), CliError> {
    let urls = args.context.urls()?;
    if args.once {
        return once(args, &urls);
    }
    if !std::io::stdout().is_terminal() {
        let message = "top needs a terminal: --once prints one frame";
        return Err(CliError::usage(message));
    }
    // The context is checked before the screen is taken.
    args.context.resolve()?;
    let shared = Arc::new(Mutex::new(Seen::default()));
    watch(args, urls, &shared)?;
    live(&shared)
}

fn once(args: &TopArgs, urls: &Urls) -> Result<(), CliError> {
    let context = args.context.resolve()?;
    let seen = crate::roles::thread()?.block_on(async {
        let asked = Asked::new(context)?;
        Ok::<_, CliError>(look_once(Some(&asked), urls, &BTreeMap::new()).await)
    })?;
    let scene = Scene::of(&seen, Sort::default());
    result(&draw::text(&scene, WIDTH));
    if scene.nothing {
        return Err(CliError::because(
            Exit::Unreachable,
            "neither a control node nor a balancer answers: `forebay check` says more",
        ));
    }
    Ok(())
}

/// Looks again and again, beside the screen.
fn watch(args: &TopArgs, urls: Urls, shared: &Arc<Mutex<Seen>>) -> Result<(), CliError> {
    let (runtime, context) = (crate::roles::thread()?, args.context.clone());
    let (interval, shared) = (Duration::from_secs(args.interval), Arc::clone(shared));
    let looking = std::thread::Builder::new().name("look".into());
    let looking = looking.spawn(move || {
        runtime.block_on(async {
            let asked = context.resolve().and_then(Asked::new).ok();
            loop {
                let began = Instant::now();
                let before = lock(&shared).requests();
                let mut seen = look_once(asked.as_ref(), &urls, &before).await;
                seen.looked = true;
                *lock(&shared) = seen;
                tokio::time::sleep(interval.saturating_sub(began.elapsed())).await;
            }
        });
    });
    looking.map(drop).map_err(|error| CliError::System {
        what: "cannot start a thread",
        error,
    })
}

async fn look_once(
    asked: Option<&Asked>,
    urls: &Urls,
    before: &BTreeMap<String, (Instant, f64)>,
) -> Seen {
    let facts = async {
        match asked {
            Some(asked) => asked.client.read(LOOK_TIME).await.ok(),
            None => None,
        }
    };
    let nodes = async {
        match asked {
            Some(asked) => asked.nodes().await,
            None => Vec::new(),
        }
    };
    let (facts, nodes, balancers, agents) = futures::join!(
        facts,
        nodes,
        look::processes(&urls.balancers, LOOK_TIME),
        look::processes(&urls.agents, LOOK_TIME),
    );
    let mut seen = Seen {
        looked: true,
        at: Some(Instant::now()),
        facts,
        nodes,
        balancers,
        agents,
        rates: BTreeMap::new(),
    };
    seen.rates = seen.rates_since(before);
    seen
}

fn live(shared: &Mutex<Seen>) -> Result<(), CliError> {
    let failed = |error: std::io::Error| CliError::System {
        what: "cannot draw on the terminal",
        error,
    };
    let mut terminal = ratatui::try_init().map_err(failed)?;
    let drawn = (|| {
        let mut sort = Sort::default();
        loop {
            let scene = Scene::of(&lock(shared), sort);
            terminal.draw(|frame| draw::draw(&scene, frame))?;
            sort.first = sort.first.min(scene.workers.len().saturating_sub(1));
            if event::poll(KEYS)?
                && let Event::Key(key) = event::read()?
                && key.kind == KeyEventKind::Press
                && !pressed(key, &mut sort)
            {
                return Ok(());
            }
        }
    })();
    ratatui::restore();
    drawn.map_err(failed)
}

/// Whether to go on.
fn pressed(key: KeyEvent, sort: &mut Sort) -> bool {
    match key.code {
        KeyCode::Char('q') | KeyCode::Esc => return false,
        KeyCode::Char('c') if key.modifiers.contains(KeyModifiers::CONTROL) => return false,
        KeyCode::Down => sort.first += 1,
        KeyCode::Up => sort.first = sort.first.saturating_sub(1),
        KeyCode::PageDown => sort.first += 10,
        KeyCode::PageUp => sort.first = sort.first.saturating_sub(10),
        KeyCode::Right => sort.column = (sort.column + 1) % scene::COLUMNS.len(),
        KeyCode::Left => {
            sort.column = (sort.column + scene::COLUMNS.len() - 1) % scene::COLUMNS.len();
        }
        KeyCode::Char('r') => sort.reversed = !sort.reversed,
        _ => {}
    }
    true
}

fn lock(shared: &Mutex<Seen>) -> std::sync::MutexGuard<'_, Seen> {
    shared.lock().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn keys_move_sort_and_quit() {
        let mut sort = Sort::default();
        let mut press = |code: KeyCode, with: KeyModifiers| {
            let on = pressed(KeyEvent::new(code, with), &mut sort);
            (on, sort.column, sort.reversed, sort.first)
        };
        let none = KeyModifiers::NONE;
        assert_eq!(
            press(KeyCode::Up, none),
            (true, 0, false, 0),
            "it is the first"
        );
        assert_eq!(press(KeyCode::Down, none), (true, 0, false, 1));
        assert_eq!(press(KeyCode::PageDown, none), (true, 0, false, 11));
        assert_eq!(press(KeyCode::Left, none), (true, 8, false, 11), "round");
        assert_eq!(press(KeyCode::Right, none), (true, 0, false, 11));
        assert_eq!(press(KeyCode::Char('r'), none), (true, 0, true, 11));
        assert!(press(KeyCode::Char('c'), none).0);
        assert!(!press(KeyCode::Char('c'), KeyModifiers::CONTROL).0);
        assert!(!press(KeyCode::Char('q'), none).0 && !press(KeyCode::Esc, none).0);
    }
}
