//! Programs of the store of tools (`tools.img` of the assets) in forks of a Debian guest that serves pages.

use std::process::Stdio;

use anyhow::{Context, Result, ensure};
use serde_json::Value;

use crate::linux::{Vm, from_env};

/// Has every process of the list `$1` traced while the page `$2` is fetched from nginx in the fork, and prints the trace.
///
/// The request goes out when strace has said of each that it is attached: what is done for it is in the trace from the first call on.
const TRACE: &str = "set -e
    strace -f -s 200 -e trace=%file,accept4,recvfrom,writev,write,close -o /tmp/trace -p \"$1\" 2>/tmp/attached & tracer=$!
    for process in ${1//,/ }; do
        until grep -q \"Process $process attached\" /tmp/attached; do
            kill -0 $tracer 2>/dev/null || { cat /tmp/attached >&2; exit 1; }
            sleep 0.05
        done
    done
    exec 3<>/dev/tcp/127.0.0.1/80
    printf 'GET %s HTTP/1.0\\r\\n\\r\\n' \"$2\" >&3
    cat <&3 >/tmp/answer
    kill $tracer
    wait $tracer || true
    cat /tmp/trace";

/// What the store is called to `--store`: as it is for every fork, since what is written to it goes with the fork.
pub fn store() -> Result<String> {
    Ok(format!("{},overlay", from_env("CIVIC_ASSETS")?.join("tools.img").display()))
}

/// The program that traces processes (`1,2,3`) while `page` is asked of nginx.
pub fn trace<'a>(processes: &'a str, page: &'a str) -> [&'a str; 6] {
    ["bash", "-c", TRACE, "trace", processes, page]
}

/// The processes of nginx that serve, as `1,2,3`, by the guest's own word.
pub fn workers(vm: &mut Vm) -> Result<String> {
    vm.sh("pgrep -d, -f '^nginx: worker process *$'")
}

/// What a program of the store said in a fork.
pub struct Look {
    /// Its output.
    pub stdout: String,
    /// What it complained of.
    pub stderr: String,
    /// The line that `civic inspect --json` told.
    pub told: Value,
}

impl Look {
    /// Runs it by `civic inspect`; it must succeed.
    pub fn at(vm: &Vm, program: &[&str]) -> Result<Self> {
        let mut command = vm.inspecting()?;
        command.args(["--store", &store()?, "--json", "--"]).args(program);
        let out = command.stdin(Stdio::null()).output()?;
        let said = || format!("{program:?} ended with {}: {}{}", out.status, shown(&out.stdout), shown(&out.stderr));
        let told: Value = serde_json::from_slice(&out.stdout).with_context(said)?;
        ensure!(out.status.success(), said());
        let text = |of: &str| Some(told[of]["text"].as_str()?.to_owned());
        let (stdout, stderr) = (text("stdout").with_context(said)?, text("stderr").with_context(said)?);
        Ok(Self { stdout, stderr, told })
    }

    /// Milliseconds of one of the times that were told, such as `/pause_us`, if there is that.
    pub fn ms(&self, pointer: &str) -> Option<f64> {
        Some(self.told.pointer(pointer)?.as_f64()? / 1e3)
    }
}

fn shown(bytes: &[u8]) -> String {
    String::from_utf8_lossy(bytes).into_owned()
}
