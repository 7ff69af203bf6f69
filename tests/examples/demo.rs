//! What `cargo xtask demo` shows, on the machine that guests run on: a Debian that serves pages to clients all the while, and what tools of a store
//! find in forks of it. It fails if a single request is lost.

use std::io::{Read, Write};
use std::net::TcpStream;
use std::process::ExitCode;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use civic_tests::linux::Vm;
use civic_tests::load::served::{Served, debian};
use civic_tests::stored::{Look, trace, workers};

/// What the clients do not ask for.
const PAGE: &str = "/no-such-page";
/// When a look had come how far, as `civic inspect --json` tells it.
const STAGES: [(&str, &str); 6] = [
    ("waiting_us", "the fork's monitor waited"),
    ("alive_us", "the fork ran"),
    ("started_us", "the program was started in it"),
    ("first_output_us", "the program's first output was here"),
    ("ended_us", "the program had ended"),
    ("discarded_us", "nothing was left of the fork"),
];

fn main() -> ExitCode {
    match show() {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("demo: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn show() -> Result<()> {
    println!("\n== Debian with systemd and nginx boots in civic …");
    let begun = Instant::now();
    let mut served = Served::start(&debian(2))?;
    println!("it serves pages, and writes its disk; {:.1} s after the start", begun.elapsed().as_secs_f64());
    civic(&served.vm, &["list"])?;
    civic(&served.vm, &["info", &served.vm.name])?;
    println!("\n$ curl http://{}/\n{}", served.vm.tap.guest, fetch(&served.vm)?);

    let workers = workers(&mut served.vm)?;
    let rate = served.rate()?;
    println!(
        "\n== clients ask for {rate:.0} pages a second from now on, each when it is due, whatever became of those before"
    );
    let load = served.load(rate)?;
    let looks = [
        look(&served.vm, &["ps", "-C", "nginx", "-o", "pid,user,stat,rss,time,args"], "nginx: worker process"),
        look(&served.vm, &["ss", "-ltnp"], "nginx"),
        look(&served.vm, &["lsof", "-nPw", "-p", &workers, "-a", "-d", "0-1023"], "*:80 (LISTEN)"),
        look(&served.vm, &trace(&workers, PAGE), &format!("GET {PAGE}")),
    ];
    // Also if a look has failed: what became of the clients is told first.
    let sent = begun.elapsed();
    let answers = load.finish()?;
    let mut times: Vec<_> = answers.iter().map(|answer| answer.took).collect();
    times.sort();
    let lost: Vec<_> = answers.iter().filter_map(|answer| answer.number.as_ref().err()).collect();
    println!("\n== {} requests meanwhile, {} lost", answers.len(), lost.len());
    let (Some(longest), Some(median)) = (times.last(), times.get(times.len() / 2)) else {
        anyhow::bail!("no client asked for anything in {:.1} s", sent.as_secs_f64());
    };
    println!("half of them were answered within {}, all within {}", shown(*median), shown(*longest));
    let pauses = looks.into_iter().collect::<Result<Vec<_>>>()?;
    println!("the guest stood still for {} in {} looks", shown(pauses.iter().sum()), pauses.len());
    ensure!(lost.is_empty(), "{} of {} requests were lost: {}", lost.len(), answers.len(), lost[0]);
    println!("\n$ civic stop {}", served.vm.name);
    served.end()?;
    println!("nothing went wrong on its disk or in its kernel's log");
    Ok(())
}

fn shown(time: Duration) -> String {
    format!("{:.1} ms", time.as_secs_f64() * 1e3)
}

/// Runs a subcommand and shows what it prints.
fn civic(vm: &Vm, args: &[&str]) -> Result<()> {
    println!("\n$ civic {}", args.join(" "));
    let out = vm.civic_with(args)?;
    print!("{}{}", String::from_utf8_lossy(&out.stdout), String::from_utf8_lossy(&out.stderr));
    ensure!(out.status.success(), "civic {} has failed", args[0]);
    Ok(())
}

/// The page that nginx serves to everybody.
fn fetch(vm: &Vm) -> Result<String> {
    let mut stream = TcpStream::connect((vm.tap.guest, 80))?;
    stream.set_read_timeout(Some(Duration::from_secs(60)))?;
    stream.write_all(format!("GET / HTTP/1.0\r\nHost: {}\r\n\r\n", vm.tap.guest).as_bytes())?;
    let mut answer = String::new();
    stream.read_to_string(&mut answer)?;
    let page = answer.split_once("\r\n\r\n").with_context(|| format!("nginx served {answer:?}"))?.1;
    ensure!(page.contains("nginx"), "that is not nginx's page: {page:?}");
    Ok(page.trim().to_owned())
}

/// Looks into a fork with a tool, shows what it says, of which this must be a part, and when what was done. How long the guest itself stood still.
fn look(vm: &Vm, program: &[&str], part: &str) -> Result<Duration> {
    let words =
        program.iter().map(|word| if word.contains([' ', '\n']) { format!("'{word}'") } else { (*word).into() });
    println!(
        "\n$ civic inspect {} --store tools.img,overlay --json -- {}",
        vm.name,
        words.collect::<Vec<_>>().join(" ")
    );
    let look = Look::at(vm, program).with_context(|| program[0].to_owned())?;
    print!("{}{}", look.stdout, look.stderr);
    ensure!(look.stdout.contains(part), "{} does not say '{part}'", program[0]);
    for (name, what) in STAGES {
        let ms = look.ms(&format!("/stages/{name}")).with_context(|| format!("{name} was not told"))?;
        println!("  {ms:>9.1} ms   {what}");
    }
    let pause = look.ms("/pause_us").context("no pause was told")?;
    println!("  {pause:>9.1} ms   for which {} stood still", vm.name);
    Ok(Duration::from_secs_f64(pause / 1e3))
}
