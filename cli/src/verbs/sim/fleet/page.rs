//! The report: one HTML page that needs nothing else, with its numbers inside.

use std::fmt::Write as _;

use forebay_sim::fleet::{Estimate, Figures, Pictures};
use serde::Serialize;

use super::charts::{self, Bars, Look, PALETTE, duration, short};
use super::{Ran, Report};

/// What the page says of the run besides its report.
pub(super) struct About {
    /// The command line that gives the same page.
    pub(super) command: String,
    /// The trace, without its folder.
    pub(super) trace: String,
    /// What was set, as name and value.
    pub(super) facts: Vec<(&'static str, String)>,
    /// Whether the rates were searched for; else one was given.
    pub(super) searched: bool,
}

/// The page.
pub(super) fn page(report: &Report, pictures: &Pictures, about: &About) -> String {
    let page = Page {
        report,
        pictures,
        about,
        looks: looks(report),
        results: report.results().map(|(_, _, ran)| ran).collect(),
    };
    let mut html = format!(
        "<!DOCTYPE html>\n<html lang=\"en\">\n<head>\n<meta charset=\"utf-8\">\n\
         <meta name=\"viewport\" content=\"width=device-width, initial-scale=1\">\n\
         <title>{}</title>\n<style>\n{}</style>\n</head>\n<body>\n",
        escaped(&page.title()),
        include_str!("page.css"),
    );
    page.head(&mut html);
    html.push_str("<div class=\"grid\">\n");
    page.goodput(&mut html);
    page.ttft(&mut html);
    page.bars(&mut html);
    html.push_str("</div>\n");
    page.staleness(&mut html);
    page.tables(&mut html);
    page.numbers(&mut html);
    html.push_str("</body>\n</html>\n");
    html
}

/// Text, for HTML.
pub(super) fn escaped(text: &str) -> String {
    let mut html = String::with_capacity(text.len());
    for character in text.chars() {
        match character {
            '&' => html.push_str("&amp;"),
            '<' => html.push_str("&lt;"),
            '>' => html.push_str("&gt;"),
            '"' => html.push_str("&quot;"),
            '\'' => html.push_str("&#39;"),
            other => html.push(other),
        }
    }
    html
}

/// Colours go by policy: with our queue a policy keeps its colour, and its lines are dashed.
fn looks(report: &Report) -> Vec<Look> {
    let mut names: Vec<&str> = Vec::new();
    let look = |(name, ours, _): (&'static str, bool, &Ran)| {
        let seen = names.iter().position(|one| *one == name);
        let place = seen.unwrap_or(names.len());
        if seen.is_none() {
            names.push(name);
        }
        let label = if ours {
            format!("{name}, our queue")
        } else {
            name.to_owned()
        };
        Look {
            label,
            colour: place % PALETTE.len(),
            dashed: seen.is_some() || place >= PALETTE.len(),
            width: if place == 0 { 6 } else { 4 },
        }
    };
    report.results().map(look).collect()
}

struct Page<'a> {
    report: &'a Report,
    pictures: &'a Pictures,
    about: &'a About,
    looks: Vec<Look>,
    results: Vec<&'a Ran>,
}

impl Page<'_> {
    fn title(&self) -> String {
        let Self { about, report, .. } = self;
        format!("{} on {} workers", about.trace, report.workers)
    }

    fn head(&self, html: &mut String) {
        let _ = write!(
            html,
            "<header>\n<h1>{}</h1>\n<p class=\"verdict\">{}</p>\n<div class=\"tiles\">",
            escaped(&self.title()),
            escaped(&self.verdict()),
        );
        for (value, of) in self.tiles() {
            let _ = write!(
                html,
                "<div><b>{}</b><span>{}</span></div>",
                escaped(&value),
                escaped(&of)
            );
        }
        html.push_str("</div>\n<dl class=\"facts\">");
        for (name, value) in &self.about.facts {
            let _ = write!(
                html,
                "<div><dt>{name}</dt><dd>{}</dd></div>",
                escaped(value)
            );
        }
        let _ = write!(
            html,
            "</dl>\n<p class=\"note\">The same again:</p>\n<pre>{}</pre>\n</header>\n",
            escaped(&self.about.command)
        );
    }

    /// The best by what was asked for, of equals the one that was named first.
    fn best(&self, by: impl Fn(&Ran) -> f64) -> usize {
        let values: Vec<f64> = self.results.iter().map(|ran| by(ran)).collect();
        let most = values.iter().copied().fold(f64::MIN, f64::max);
        values.iter().position(|value| *value >= most).unwrap_or(0)
    }

    fn verdict(&self) -> String {
        if !self.about.searched {
            let best = self.best(|ran| ran.figures.attainment);
            let kept = &self.results[best].figures;
            let rest = self.results.iter().zip(&self.looks).enumerate();
            let rest = rest.filter(|(place, _)| *place != best);
            let rest: Vec<String> = rest
                .map(|(_, (ran, look))| {
                    format!("{} for {}", look.label, percent(ran.figures.attainment))
                })
                .collect();
            let rest = if rest.is_empty() {
                String::new()
            } else {
                format!("; {}", rest.join(", "))
            };
            return format!(
                "At {} requests/s, {} keeps both targets for {} of all requests{rest}.",
                short(kept.rate),
                self.looks[best].label,
                percent(kept.attainment),
            );
        }
        let of = |share: &str, get: fn(&Ran) -> (Option<f64>, Option<Estimate>)| {
            let best = self.best(|ran| get(ran).0.unwrap_or(0.0));
            let (goodput, over) = get(self.results[best]);
            let goodput = short(goodput.unwrap_or(0.0));
            let over = estimate(over);
            let kept = format!(
                "{share} of all requests up to {goodput} requests/s ({over} of the fluid bound)"
            );
            (best, kept)
        };
        let (best90, at90) = of("90 %", |ran| (ran.goodput90, ran.of_bound90));
        let (best99, at99) = of("99 %", |ran| (ran.goodput99, ran.of_bound99));
        let who = if best90 == best99 {
            String::new()
        } else {
            format!("{} ", self.looks[best99].label)
        };
        let factors = self.factors().map_or(String::new(), |(at90, at99)| {
            format!(": {at90} and {at99} times what least-requests serves")
        });
        format!(
            "{} keeps both targets for {at90}, and {who}for {at99}{factors}.",
            self.looks[best90].label
        )
    }

    /// The best of each share over least-requests.
    fn factors(&self) -> Option<(String, String)> {
        let mut results = self.report.results();
        let (_, _, theirs) = results.find(|(name, ours, _)| *name == "least-requests" && !ours)?;
        let factor = |get: fn(&Ran) -> (Option<f64>, Option<Estimate>)| {
            let best = self.best(|ran| get(ran).0.unwrap_or(0.0));
            let (goodput, first_over_it) = get(theirs);
            if std::ptr::eq(self.results[best], theirs) {
                return None;
            }
            // Seed by seed where the first contender is the best; else there are only the means.
            match (best, get(self.results[best]).0, goodput) {
                (0, ..) => Some(estimate(first_over_it.filter(|one| one.mean.is_finite()))),
                (_, Some(best), Some(theirs)) if theirs > 0.0 => Some(short(best / theirs)),
                _ => None,
            }
        };
        Some((
            factor(|ran| (ran.goodput90, ran.first_over_this90))?,
            factor(|ran| (ran.goodput99, ran.first_over_this99))?,
        ))
    }

    fn tiles(&self) -> Vec<(String, String)> {
        let tile = |value: String, of: String| (value, of);
        if !self.about.searched {
            let best = self.best(|ran| ran.figures.attainment);
            let (name, figures) = (&self.looks[best].label, &self.results[best].figures);
            return vec![
                tile(
                    percent(figures.attainment),
                    format!("within both targets, {name}"),
                ),
                tile(duration(figures.ttft_p99_ms), "to first token, p99".into()),
                tile(percent(figures.hit_ratio), "of prompt tokens cached".into()),
            ];
        }
        let best90 = self.best(|ran| ran.goodput90.unwrap_or(0.0));
        let best99 = self.best(|ran| ran.goodput99.unwrap_or(0.0));
        let of = |share: &str, best: usize| {
            format!("of the fluid bound at {share}, {}", self.looks[best].label)
        };
        let mut tiles = vec![
            tile(
                estimate(self.results[best90].of_bound90),
                of("90 %", best90),
            ),
            tile(
                estimate(self.results[best99].of_bound99),
                of("99 %", best99),
            ),
        ];
        if let Some((at90, _)) = self.factors() {
            tiles.push(tile(
                format!("{at90} ×"),
                "least-requests’ load at 90 %".into(),
            ));
        }
        tiles
    }

    fn goodput(&self, html: &mut String) {
        let Pictures { curves, common, .. } = self.pictures;
        let dot = |figures: &Figures| (figures.rate, figures.rate * figures.attainment);
        let kept = |ran: &&Ran| {
            let at90 = self.about.searched.then_some(&ran.figures);
            [at90, ran.at99.as_ref()].map(|figures| figures.map(dot))
        };
        let kept: Vec<_> = self.results.iter().map(kept).collect();
        let chart = charts::goodput(
            &self.looks,
            curves,
            &kept,
            self.report.fluid_bound,
            common.rate,
        );
        let dots = if self.about.searched {
            " Dots: the highest loads that the search found for each share."
        } else {
            ""
        };
        let bound = self.report.fluid_bound;
        let short_trace = if curves.iter().flatten().any(|point| point.goodput > bound) {
            " Goodput above the bound says that the trace ends before its queues have grown: take a longer one."
        } else {
            ""
        };
        let note = format!(
            "Requests a second that kept both targets. A curve that leaves the line of 90 % fails a tenth of \
             its requests.{dots} The dotted line is the load of the comparisons that follow.{short_trace} {}",
            self.seeds()
        );
        section(
            html,
            "goodput",
            "Goodput against offered load",
            &chart,
            &note,
        );
    }

    fn ttft(&self, html: &mut String) {
        let common = &self.pictures.common;
        let mut body = charts::ttft(&self.looks, &common.ttft, common.target_ms);
        let head = ["policy", "TTFT p50", "TTFT p99", "kept both"].map(str::to_owned);
        let rows = self
            .looks
            .iter()
            .zip(&common.figures)
            .map(|(look, figures)| {
                [
                    key(look),
                    duration(figures.ttft_p50_ms),
                    duration(figures.ttft_p99_ms),
                    percent(figures.attainment),
                ]
            });
        body.push_str(&table(&head, rows));
        let [short_prompt, median, long] = common.target_ms.map(duration);
        let targets = if short_prompt == long {
            format!("The target is {median}.")
        } else {
            format!(
                "The target grows with the prompt: {median} for the median one; the band holds those of \
                 the middle 80 %, {short_prompt} to {long}."
            )
        };
        let note = format!(
            "All policies at {} requests/s{}. Dots: p50 and p99 of all that were offered. {targets}",
            short(common.rate),
            self.common_is(),
        );
        section(html, "ttft", "Time to first token", &body, &note);
    }

    fn bars(&self, html: &mut String) {
        let figures = &self.pictures.common.figures;
        let values = |of: fn(&Figures) -> f64| figures.iter().map(of).collect::<Vec<f64>>();
        let ceiling = self.report.fluid_hit_ratio;
        let hits = Bars {
            alt: "Share of prompt tokens that were in a cache, by policy",
            from: 0.0,
            to: ceiling,
            ceiling: Some((ceiling, format!("one pooled cache {}", percent(ceiling)))),
            axis: "prompt tokens in a cache",
            write: percent,
        };
        let chart = hits.draw(&self.looks, &values(|one| one.hit_ratio));
        let rate = short(self.pictures.common.rate);
        let note = format!(
            "At {rate} requests/s. The dashed line is what one cache of the whole fleet’s size would hold."
        );
        section(html, "hits", "Cache hits", &chart, &note);
        let balance = Bars {
            alt: "The busiest worker's time over the mean, by policy",
            from: 1.0,
            to: 1.25,
            ceiling: None,
            axis: "busiest worker over the mean",
            write: |value| format!("{value:.2}"),
        };
        let chart = balance.draw(&self.looks, &values(|one| one.max_over_mean));
        let note = format!("At {rate} requests/s. 1 is a fleet whose workers are equally busy.");
        section(html, "balance", "Balance", &chart, &note);
    }

    fn staleness(&self, html: &mut String) {
        let grids = &self.pictures.grids;
        let cells = grids
            .of
            .iter()
            .flat_map(|grid| grid.attainment.iter().flatten());
        let least = (cells.copied().fold(0.9, f64::min) * 10.0).floor() / 10.0;
        let mut body = String::from("<div class=\"grid\">");
        for grid in &grids.of {
            let label = &self.looks[grid.contender].label;
            body.push_str(&charts::heat(label, grids, grid, least));
        }
        body.push_str("</div>");
        let whom = if grids.of.len() > 1 {
            " and of the best of the others"
        } else {
            ""
        };
        let note = format!(
            "Percent of requests within both targets, of the first policy{whom}, at {} requests/s: 0.95 of what \
             {} keeps 90 % at with one balancer and fresh reports. Colours run from {} (dark) to 100 % (bright). {}",
            short(grids.rate),
            self.looks[0].label,
            percent(least),
            self.seeds(),
        );
        html.push_str("<div class=\"wide\">\n");
        section(
            html,
            "staleness",
            "Old reports and many balancers",
            &body,
            &note,
        );
        html.push_str("</div>\n");
    }

    fn tables(&self, html: &mut String) {
        let mut body = String::new();
        if self.about.searched {
            let head = [
                "policy",
                "at 90 % (req/s)",
                "of bound",
                "first over this",
                "at 99 % (req/s)",
                "of bound",
                "first over this",
            ]
            .map(str::to_owned);
            let rows = self.looks.iter().zip(&self.results).map(|(look, ran)| {
                [
                    key(look),
                    ran.goodput90.map_or_else(dash, short),
                    estimate(ran.of_bound90),
                    estimate(ran.first_over_this90),
                    ran.goodput99.map_or_else(dash, short),
                    estimate(ran.of_bound99),
                    estimate(ran.first_over_this99),
                ]
            });
            body.push_str("<h3>Highest loads</h3>");
            body.push_str(&table(&head, rows));
            body.push_str("<h3>Each at the load where it keeps 90 %</h3>");
            body.push_str(&self.figures(|ran| Some(&ran.figures)));
            body.push_str("<h3>Each at the load where it keeps 99 %</h3>");
            body.push_str(&self.figures(|ran| ran.at99.as_ref()));
        } else {
            body.push_str(&self.figures(|ran| Some(&ran.figures)));
        }
        let intervals = if self.report.seeds > 1 {
            format!(
                "Means over {} seeds; ± is half of the 95 % interval.",
                self.report.seeds
            )
        } else {
            "One seed, so there are no intervals; --seeds 5 gives them.".into()
        };
        html.push_str("<div class=\"wide\">\n");
        section(html, "figures", "All figures", &body, &intervals);
        html.push_str("</div>\n");
    }

    fn figures<'a>(&'a self, of: impl Fn(&'a Ran) -> Option<&'a Figures>) -> String {
        let head = [
            "policy",
            "req/s",
            "kept both",
            "cached",
            "TTFT p50",
            "TTFT p99",
            "TPOT p99",
            "max/mean",
            "busy",
            "refusals/req",
            "questions/req",
            "failed",
        ]
        .map(str::to_owned);
        let rows = self
            .looks
            .iter()
            .zip(&self.results)
            .filter_map(|(look, ran)| {
                let figures = of(ran)?;
                Some([
                    key(look),
                    short(figures.rate),
                    percent(figures.attainment),
                    percent(figures.hit_ratio),
                    duration(figures.ttft_p50_ms),
                    duration(figures.ttft_p99_ms),
                    duration(figures.tpot_p99_ms),
                    format!("{:.2}", figures.max_over_mean),
                    percent(figures.busy),
                    format!("{:.3}", figures.refusals),
                    format!("{:.3}", figures.questions),
                    format!("{:.0}", figures.failed),
                ])
            });
        table(&head, rows)
    }

    fn numbers(&self, html: &mut String) {
        html.push_str(
            "<p class=\"note\">This page holds its numbers as JSON: the element “report” is what the command \
             prints with --output json, “pictures” what the charts show.</p>\n",
        );
        data(html, "report", self.report);
        data(html, "pictures", self.pictures);
    }

    fn common_is(&self) -> String {
        if !self.about.searched {
            return String::new();
        }
        let first = &self.looks[0].label;
        format!(", the highest load at which {first} was found to keep 90 %")
    }

    fn seeds(&self) -> String {
        match self.pictures.seeds.as_slice() {
            [seed] => format!("Seed {seed} alone."),
            seeds => format!("Means over {} of the seeds.", seeds.len()),
        }
    }
}

fn section(html: &mut String, id: &str, title: &str, body: &str, note: &str) {
    let _ = write!(
        html,
        "<section id=\"{id}\">\n<h2>{title}</h2>\n<figure>\n{body}\n<figcaption>{}</figcaption>\n</figure>\n</section>\n",
        escaped(note)
    );
}

/// Values in a script that nothing runs.
fn data(html: &mut String, id: &str, value: &impl Serialize) {
    let json = serde_json::to_string(value).expect("results have string keys only");
    // Only strings have it, and there it may be written like this.
    let json = json.replace('<', "\\u003c");
    let _ = writeln!(
        html,
        "<script type=\"application/json\" id=\"{id}\">{json}</script>"
    );
}

/// Cells are HTML.
fn table<const N: usize>(head: &[String; N], rows: impl Iterator<Item = [String; N]>) -> String {
    let mut html = String::from("<div class=\"scroll\"><table><thead><tr>");
    for name in head {
        let _ = write!(html, "<th scope=\"col\">{name}</th>");
    }
    html.push_str("</tr></thead><tbody>\n");
    for row in rows {
        html.push_str("<tr>");
        for cell in row {
            let _ = write!(html, "<td>{cell}</td>");
        }
        html.push_str("</tr>\n");
    }
    html.push_str("</tbody></table></div>\n");
    html
}

fn key(look: &Look) -> String {
    let dashed = if look.dashed { " dashed" } else { "" };
    format!(
        "<i class=\"key k{}{dashed}\"></i>{}",
        look.colour,
        escaped(&look.label)
    )
}

fn estimate(of: Option<Estimate>) -> String {
    match of {
        None => dash(),
        Some(Estimate { mean, ci95: None }) => short(mean),
        Some(Estimate {
            mean,
            ci95: Some(half),
        }) => format!("{} ± {}", short(mean), short(half)),
    }
}

fn percent(share: f64) -> String {
    format!("{:.1} %", share * 100.0)
}

fn dash() -> String {
    "–".into()
}
