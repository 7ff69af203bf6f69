//! The terminal in raw mode, and given back whatever happens; and signs of life on it.

use std::io::{self, IsTerminal, Write};
use std::time::Duration;

use indicatif::{ProgressBar, ProgressStyle};
use nix::sys::termios::{SetArg, Termios, cfmakeraw, tcgetattr, tcsetattr};

/// Standard input's terminal in raw mode: every key goes to the guest. Dropping it restores the terminal.
pub struct Raw {
    before: Termios,
}

impl Raw {
    /// Puts the terminal on standard input into raw mode; None if there is none.
    pub fn enter() -> io::Result<Option<Self>> {
        let stdin = io::stdin();
        if !stdin.is_terminal() {
            return Ok(None);
        }
        let before = tcgetattr(&stdin)?;
        let mut raw = before.clone();
        cfmakeraw(&mut raw);
        tcsetattr(&stdin, SetArg::TCSANOW, &raw)?;
        Ok(Some(Self { before }))
    }
}

impl Drop for Raw {
    fn drop(&mut self) {
        // Not TCSADRAIN: a terminal that is held with Ctrl-S must not hold us. Nothing can be done about an error.
        let _ = tcsetattr(io::stdin(), SetArg::TCSANOW, &self.before);
    }
}

/// A word of ours between the guest's output; works in raw mode too.
pub fn remark(text: &str) {
    let _ = write!(io::stderr(), "\r\n[civic: {text}]\r\n");
}

/// A sign of life on a terminal; nothing elsewhere.
pub fn spinner(message: impl Into<std::borrow::Cow<'static, str>>) -> ProgressBar {
    if !std::io::stderr().is_terminal() {
        return ProgressBar::hidden();
    }
    let spinner = ProgressBar::new_spinner().with_message(message);
    if let Ok(style) = ProgressStyle::with_template("{spinner} {msg} ({elapsed})") {
        spinner.set_style(style);
    }
    spinner.enable_steady_tick(Duration::from_millis(100));
    spinner
}
