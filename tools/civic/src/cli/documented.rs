//! What the documentation and the help tell people to type can be typed.

use clap::{CommandFactory, Parser};

use super::Cli;

const TEXTS: [(&str, &str); 9] = [
    ("README.md", include_str!("../../../../README.md")),
    ("docs/guide.md", include_str!("../../../../docs/guide.md")),
    ("docs/inspect.md", include_str!("../../../../docs/inspect.md")),
    ("docs/stores.md", include_str!("../../../../docs/stores.md")),
    ("docs/support.md", include_str!("../../../../docs/support.md")),
    ("docs/examples/README.md", include_str!("../../../../docs/examples/README.md")),
    ("docs/examples/agents/README.md", include_str!("../../../../docs/examples/agents/README.md")),
    ("docs/examples/autotuning/README.md", include_str!("../../../../docs/examples/autotuning/README.md")),
    ("docs/examples/troubleshooting/README.md", include_str!("../../../../docs/examples/troubleshooting/README.md")),
];

/// The commands of a shell's lines that are Civic's, as their arguments.
fn commands(lines: &str) -> Vec<Vec<String>> {
    let lines = lines.replace("\\\n", " ");
    let lines = lines.lines().map(str::trim_start).filter(|line| line.contains("civic "));
    let mut commands = Vec::new();
    for line in lines {
        let words = shlex::split(line).unwrap_or_else(|| panic!("not a shell's line: {line}"));
        let mut command = Vec::new();
        for word in words {
            let (word, ends) = match word.strip_suffix(';') {
                Some(word) => (word.to_owned(), true),
                None => (word, false),
            };
            let between = ["|", "&&", "||", "&", ">", ">>"].contains(&word.as_str());
            if !between {
                command.push(word);
            }
            if ends || between {
                commands.push(std::mem::take(&mut command));
            }
        }
        commands.push(command);
    }
    commands.retain(|command| command.first().is_some_and(|word| word == "civic"));
    commands
}

/// Code: what stands between fences, or is indented.
fn code(text: &str) -> String {
    let mut fenced = false;
    let mut code = String::new();
    for line in text.lines() {
        if line.starts_with("```") {
            fenced = !fenced;
        } else if fenced || line.starts_with("    ") {
            code += line;
            code += "\n";
        }
    }
    code
}

fn examples(command: &clap::Command) -> String {
    let help = command.get_after_help().map(ToString::to_string).unwrap_or_default();
    let mut lines = help.lines().skip_while(|line| !line.starts_with("Example")).skip(1).collect::<Vec<_>>().join("\n");
    for command in command.get_subcommands() {
        lines += "\n";
        lines += &examples(command);
    }
    lines
}

fn check(from: &str, lines: &str, least: usize) {
    let commands = commands(lines);
    assert!(commands.len() >= least, "{from} has {} commands", commands.len());
    for command in commands {
        if let Err(e) = Cli::try_parse_from(&command) {
            // Its help is what was asked for.
            assert!(!e.use_stderr(), "{from}: {command:?}: {e}");
        }
    }
}

#[test]
fn what_the_documentation_says_can_be_typed() {
    for (name, text) in TEXTS {
        let least = match name {
            "README.md" | "docs/guide.md" => 20,
            "docs/inspect.md" => 5,
            "docs/stores.md" => 3,
            _ => 0,
        };
        check(name, &code(text), least);
    }
}

#[test]
fn what_the_help_says_can_be_typed() {
    check("the help", &examples(&Cli::command()), 40);
}

#[test]
fn a_childs_number_stays_in_the_help() {
    for name in ["fork", "inspect"] {
        let mut cli = Cli::command();
        let help = cli.find_subcommand_mut(name).expect("there is one").render_long_help().to_string();
        assert!(help.contains("'{n}' in"), "{help}");
        let mut page = Vec::new();
        clap_mangen::Man::new(Cli::command().find_subcommand(name).expect("there is one").clone())
            .render(&mut page)
            .expect("a vector takes everything");
        let page = String::from_utf8(page).expect("it is text");
        assert!(page.contains("{n}") && !page.contains('\u{1b}'), "{page}");
    }
}

#[test]
fn what_cannot_be_typed_is_found() {
    assert_eq!(commands("a | civic list; civic info x # y\n  civic \\\n tree\n# civic z").len(), 3);
    let wrong = |line: &str| std::panic::catch_unwind(|| check("here", line, 1)).is_err();
    assert!(wrong("civic frok web"));
    assert!(wrong("cargo build"), "too few");
    assert!(!wrong("civic list"));
}
