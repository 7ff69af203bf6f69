//! Errors that end with what to do.

use std::fmt::Write;

use civic_api::{ErrorBody, ErrorCode};

/// An error with a hint of its own.
pub fn error(message: impl Into<String>, hint: impl Into<String>) -> anyhow::Error {
    ErrorBody::new(ErrorCode::Internal, message).with_hint(hint).into()
}

/// `error` and its sources on one line.
pub fn chain(error: &(dyn std::error::Error + 'static)) -> String {
    ErrorBody::from_error(ErrorCode::Internal, error).message
}

/// What to print for `error`: the chain of causes on one line, then what to do on the last.
pub fn told(error: &anyhow::Error) -> String {
    let mut text = format!("civic: {error:#}");
    let hinted = error.downcast_ref::<ErrorBody>().is_some_and(|body| body.hint.is_some());
    if !hinted {
        let _ = write!(text, "\n'civic doctor' checks this host; 'civic help' shows what can be asked");
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;
    use anyhow::Context;

    #[test]
    fn the_last_line_says_what_to_do() {
        let last = |error: anyhow::Error| told(&error).lines().last().unwrap().to_owned();
        assert_eq!(last(error("no disk", "give one")), "give one");
        assert_eq!(last(Err::<(), _>(error("no disk", "give one")).context("cannot start").unwrap_err()), "give one");
        assert!(last(anyhow::anyhow!("no disk")).contains("civic doctor"));
        let body = ErrorBody::new(ErrorCode::Internal, "no disk");
        assert!(last(body.into()).contains("civic doctor"));
    }

    #[test]
    fn causes_are_on_the_first_line() {
        let error = Err::<(), _>(error("no disk", "give one")).context("cannot start web").unwrap_err();
        assert_eq!(told(&error), "civic: cannot start web: no disk\ngive one");
    }
}
