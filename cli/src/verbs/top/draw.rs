//! The scene on a terminal, or as text.

use ratatui::Frame;
use ratatui::Terminal;
use ratatui::backend::TestBackend;
use ratatui::layout::{Constraint, Layout, Rect};
use ratatui::style::{Modifier, Style};
use ratatui::text::Line;
use ratatui::widgets::{Paragraph, Row, Table, Wrap};

use super::scene::{COLUMNS, OF_BALANCERS, OF_CONTROL, Scene};

/// Draws all of it: what limits, workers, balancers, control nodes.
pub(super) fn draw(scene: &Scene, frame: &mut Frame<'_>) {
    let [head, workers, balancers, control, foot] = Layout::vertical([
        Constraint::Length(3),
        Constraint::Min(3),
        Constraint::Length(rows_of(scene.balancers.len(), MOST_BALANCERS)),
        Constraint::Length(rows_of(scene.control.len(), MOST_CONTROL)),
        Constraint::Length(1),
    ])
    .areas(frame.area());
    let bold = Style::new().add_modifier(Modifier::BOLD);
    let lines = vec![
        Line::styled(scene.title.clone(), bold),
        Line::raw(scene.limit.clone()),
    ];
    let lines = Paragraph::new(lines).wrap(Wrap { trim: true });
    frame.render_widget(lines, head);
    draw_workers(scene, frame, workers);
    let rows = scene.balancers.iter().map(|row| Row::new(row.clone()));
    let widths = [12, 10, 8, 6, 6, 8, 8, 5, 9].map(Constraint::Length);
    table(
        frame,
        balancers,
        &OF_BALANCERS.map(String::from),
        rows,
        widths,
    );
    let rows = scene.control.iter().map(|row| Row::new(row.clone()));
    let widths = [16, 10, 7, 9, 8, 24].map(Constraint::Length);
    table(frame, control, &OF_CONTROL.map(String::from), rows, widths);
    let hidden = scene
        .workers
        .len()
        .saturating_sub(usize::from(workers.height.saturating_sub(2)));
    let more = match hidden {
        0 => String::new(),
        _ => format!(
            "  {} workers, {} above",
            scene.workers.len(),
            scene.sort.first
        ),
    };
    let keys = format!("q quit  left/right sort  r reverse  up/down scroll{more}");
    frame.render_widget(Paragraph::new(keys), foot);
}

fn draw_workers(scene: &Scene, frame: &mut Frame<'_>, area: Rect) {
    let header = COLUMNS.map(String::from);
    let header: Vec<String> = header
        .into_iter()
        .enumerate()
        .map(
            |(at, name)| match (at == scene.sort.column, scene.sort.reversed) {
                (false, _) => name,
                (true, false) => format!("{name}*"),
                (true, true) => format!("{name}^"),
            },
        )
        .collect();
    let rows = scene.workers.iter().skip(scene.sort.first);
    let rows = rows.map(|row| Row::new(row.iter().map(|cell| cell.text.clone())));
    let widths = [14, 14, 5, 7, 7, 5, 8, 7, 5].map(Constraint::Length);
    table(frame, area, &header, rows, widths);
}

fn table<'a, const N: usize>(
    frame: &mut Frame<'_>,
    area: Rect,
    header: &[String],
    rows: impl IntoIterator<Item = Row<'a>>,
    widths: [Constraint; N],
) {
    let style = Style::new().add_modifier(Modifier::REVERSED);
    let header = Row::new(header.to_vec()).style(style);
    frame.render_widget(Table::new(rows, widths).header(header), area);
}

/// A header, the rows and a blank line.
fn rows_of(count: usize, most: u16) -> u16 {
    u16::try_from(count).unwrap_or(most).min(most) + 2
}

/// One frame as lines of text, as high as it has to be.
pub(super) fn text(scene: &Scene, width: u16) -> String {
    let workers = u16::try_from(scene.workers.len())
        .unwrap_or(u16::MAX)
        .min(MOST_LINES);
    let height = 3
        + (workers + 2).max(3)
        + rows_of(scene.balancers.len(), MOST_BALANCERS)
        + rows_of(scene.control.len(), MOST_CONTROL)
        + 1;
    lines(scene, width, height)
}

fn lines(scene: &Scene, width: u16, height: u16) -> String {
    let backend = TestBackend::new(width, height);
    let Ok(mut terminal) = Terminal::new(backend);
    let Ok(_) = terminal.draw(|frame| draw(scene, frame));
    let buffer = terminal.backend().buffer();
    let lines = (0..height).map(|y| {
        let line: String = (0..width).map(|x| buffer[(x, y)].symbol()).collect();
        line.trim_end().to_owned()
    });
    lines.collect::<Vec<_>>().join("\n")
}

/// Of one print.
const MOST_LINES: u16 = 1_000;
/// Of one screen: the workers need the room.
const MOST_BALANCERS: u16 = 6;
const MOST_CONTROL: u16 = 5;

#[cfg(test)]
mod tests {
    use super::super::scene::tests::seen;
    use super::super::scene::{Scene, Seen, Sort};
    use super::*;

    #[test]
    fn a_screen_of_80_by_24_has_all_of_it() {
        let names: Vec<String> = (1..=30).map(|n| format!("w{n:02}")).collect();
        let workers: Vec<_> = names
            .iter()
            .map(|name| (name.as_str(), 3, 1, 0.25))
            .collect();
        let sort = Sort {
            first: 4,
            ..Sort::default()
        };
        let screen = lines(&Scene::of(&seen(&workers), sort), 80, 24);
        assert_eq!(screen.lines().count(), 24);
        for part in [
            "forebay top   control 0/0, facts not readable   balancers 1/1 ready",
            "WORKER*",
            "w05            Open           3     1       8       25%   -        31ms",
            "BALANCER     STATE",
            "b1           ready               7      2      120ms    12.0s    40%   r12",
            "CONTROL",
            "q quit",
            "30 workers, 4 above",
        ] {
            assert!(screen.contains(part), "{part}\n{screen}");
        }
        assert!(!screen.contains("w04"), "{screen}");
    }

    #[test]
    fn one_print_has_every_worker_and_nothing_is_said_to_be_nothing() {
        let names: Vec<String> = (1..=50).map(|n| format!("w{n:02}")).collect();
        let workers: Vec<_> = names
            .iter()
            .map(|name| (name.as_str(), 3, 1, 0.25))
            .collect();
        let text = text(&Scene::of(&seen(&workers), Sort::default()), 80);
        assert!(
            names.iter().all(|name| text.contains(name.as_str())),
            "{text}"
        );
        let nothing = Seen {
            looked: true,
            ..Seen::default()
        };
        let scene = Scene::of(&nothing, Sort::default());
        assert!(scene.nothing);
        assert!(super::text(&scene, 80).contains("nothing answers"));
        assert!(
            !Scene::of(&Seen::default(), Sort::default()).nothing,
            "not looked yet"
        );
    }
}
