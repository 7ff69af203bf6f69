//! `civic info --guest`: the guest's kernel, as the monitor found it.

use civic_api::{ByteSize, Finding, GuestKernel, PerCpuSymbols, SymbolAddresses};

use crate::cli::KernelFiles;
use crate::on;
use crate::rundir::RunDir;
use crate::show::{print, print_json};
use crate::table::printable;

/// Asks for it, and shows it.
pub async fn info(dir: &RunDir, name: &str, files: &KernelFiles, json: bool) -> anyhow::Result<()> {
    let files = files.absolute()?;
    let kernel = on(dir, name, async |vm| vm.guest(&files).await).await?;
    if json { print_json(&kernel) } else { print(&describe(&kernel)) }
}

fn describe(kernel: &GuestKernel) -> String {
    let unknown = || "unknown".to_owned();
    let image = &kernel.image;
    let slid = |slide: Option<u64>| match slide {
        Some(0) => "not moved".to_owned(),
        Some(slide) => format!("moved by {slide:#x}"),
        None => "below where kernels are linked".to_owned(),
    };
    let symbols = match &kernel.symbols {
        Finding::Found(symbols) => {
            let addresses = match symbols.addresses {
                SymbolAddresses::AbsolutePerCpu => "down from a base",
                SymbolAddresses::FromBase => "up from a base",
                SymbolAddresses::FromThemselves => "relative to themselves",
            };
            let what = if symbols.names_data { "functions and data" } else { "functions only" };
            let sure = if symbols.confirmed { "" } else { "; no entry point has its name" };
            format!("{} of {what}, {addresses}{sure}", symbols.count)
        }
        Finding::Missing(why) => format!("none: {why}"),
    };
    let types = match &kernel.types {
        Finding::Found(types) => {
            let all = if types.complete { "" } else { "; some are of unknown kinds" };
            format!("{} in {}{all}", types.count, ByteSize(types.bytes))
        }
        Finding::Missing(why) => format!("none: {why}"),
    };
    let per_cpu = kernel.per_cpu.map(|per_cpu| match per_cpu {
        PerCpuSymbols::Offsets => "offsets from GS",
        PerCpuSymbols::Addresses => "addresses in the image",
    });
    let told = kernel.files.iter().map(|file| format!("{}: {} symbols", file.file, file.count)).collect::<Vec<_>>();
    let mut lines = vec![
        ("release", kernel.release.clone().unwrap_or_else(unknown)),
        ("version", kernel.version.clone().unwrap_or_else(unknown)),
        ("image", format!("{} at {}, {}", ByteSize(image.bytes), image.base, slid(image.slide))),
        ("in memory", format!("at {}, {}", image.physical, slid(image.physical_slide))),
        ("page tables", {
            let isolated = if kernel.isolated { ", programs have their own" } else { "" };
            format!("{} levels, root {}{isolated}", kernel.paging_levels, kernel.page_table)
        }),
        ("direct map", kernel.direct_map.clone().unwrap_or_else(unknown)),
        ("per CPU", per_cpu.map_or_else(unknown, str::to_owned)),
        ("symbols", symbols),
        ("exports", kernel.exports.map_or_else(|| "not found".to_owned(), |count| count.to_string())),
        ("types", types),
        ("checksums", {
            let shown =
                |sums: civic_api::GuestChecksums| format!("code {:08x}, its mapping {:08x}", sums.text, sums.mapping);
            kernel.checksums.map_or_else(unknown, shown)
        }),
        ("files", told.join(", ")),
        ("stood still", format!("{} µs of {} µs", kernel.stopped_us, kernel.took_us)),
    ];
    lines.retain(|(key, _)| *key != "files" || !told.is_empty());
    lines.iter().map(|(key, value)| format!("{:13}{}\n", format!("{key}:"), printable(value))).collect()
}
