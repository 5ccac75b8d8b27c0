//! Many activation rows and K types on processors with AMX: an instruction multiplies 16 activation rows by 16 weight rows,
//! 64 values of each.
//!
//! Its sums go over more than a sub-block, so that scales must be in the weights already: a weight times its sub-block's
//! scale fits in 16 bits, which are multiplied as two planes of 8. All of it is exact, as elsewhere.

use std::arch::asm;
use std::arch::x86_64::*;
use std::cell::RefCell;
use std::mem::offset_of;

use super::panel::{Lanes, Out, finish, panel_by_panel, vectors};
use super::rows::Eights;
use super::unpack::{Panel, ROWS, STEP, Unpack};
use super::{load, quant_tile};
use crate::activations::Lines;
use crate::quant::{ActRow, Tile};

/// Activation rows of an instruction.
const GROUP: usize = 16;
/// Bytes of [`GROUP`] rows' block.
const GROUP_BYTES: usize = GROUP * STEP;
/// Fewer activation rows are multiplied sooner without.
const MIN_ROWS: usize = 24;

/// Whether the processor has it and the system lets this process use it, for which Linux wants to be asked.
pub(crate) fn is_here() -> bool {
    const TILE_AND_INT8: u32 = 0b11 << 24;
    const TILE_STATE: u64 = 0b11 << 17;
    const LEAST_LEAF: u32 = 7;
    if __cpuid(0).eax < LEAST_LEAF || __cpuid_count(7, 0).edx & TILE_AND_INT8 != TILE_AND_INT8 {
        return false;
    }
    // SAFETY: processors with AMX have XSAVE, and the system that enabled AVX-512 enabled that.
    unsafe { _xgetbv(0) & TILE_STATE == TILE_STATE && permission() }
}

/// Asks for the use of tile data: see `Documentation/arch/x86/xstate.rst` of Linux.
#[cfg(target_os = "linux")]
fn permission() -> bool {
    const ARCH_REQ_XCOMP_PERM: libc::c_long = 0x1023;
    const XFEATURE_XTILEDATA: libc::c_long = 18;
    // SAFETY: this call touches no memory of ours.
    unsafe { libc::syscall(libc::SYS_arch_prctl, ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA) == 0 }
}

#[cfg(not(target_os = "linux"))]
fn permission() -> bool {
    false
}

thread_local! {
    /// Activations of a tile, [`packed`].
    static PACKED: RefCell<Lines> = RefCell::default();
}

/// A tile of weights of a K type.
///
/// # Safety
/// See `TileFn`.
#[target_feature(enable = "avx2,fma,f16c,avx512f,avx512bw,avx512dq,avx512vl,avx512vnni")]
pub(super) unsafe fn tile<W: Eights>(tile: &Tile<'_>) {
    if tile.x.len() < MIN_ROWS {
        // SAFETY: `TileFn`'s conditions.
        return unsafe { quant_tile::<W>(tile) };
    }
    PACKED.with_borrow_mut(|room| {
        let x = packed(tile.x, room);
        let (mut planes, mut products) = (Planes::EMPTY, Products::EMPTY);
        // SAFETY: `TileFn`'s conditions: the machine has tiles, and the activation rows the blocks of the weight rows.
        unsafe {
            configure();
            panel_by_panel::<W>(tile, |panel, b, _, sums, out| {
                planes.fill::<W>(panel);
                let groups = tile.x.len().div_ceil(GROUP);
                let blocks = x[b * groups * GROUP_BYTES..].as_chunks::<GROUP_BYTES>().0;
                let rows = tile.x.chunks(GROUP).zip(sums.chunks_mut(GROUP));
                for (i, (block, (x, sums))) in blocks.iter().zip(rows).enumerate() {
                    planes.multiply(block, &mut products);
                    products.finish::<W>(panel, x, b, sums, out.row(GROUP * i));
                }
            });
            asm!(
                "tilerelease",
                out("tmm0") _, out("tmm1") _, out("tmm2") _, out("tmm3") _,
                out("tmm4") _, out("tmm5") _, out("tmm6") _, out("tmm7") _,
                options(nomem, nostack, preserves_flags)
            );
        }
    });
}

/// Activations as tiles: `[block][group][value / 64][row][64]`; rows beyond the last are zero.
fn packed<'a>(x: &[ActRow<'_>], room: &'a mut Lines) -> &'a [i8] {
    let (blocks, groups) = (x[0].q.len() / STEP, x.len().div_ceil(GROUP));
    room.resize(blocks * groups * GROUP_BYTES);
    let (tiles, _) = room.as_chunks_mut::<{ GROUP_BYTES }>();
    for (i, tile) in tiles.iter_mut().enumerate() {
        let (b, group) = (i / groups, i % groups);
        for row in 0..GROUP {
            let row_of = x.get(GROUP * group + row);
            for part in 0..STEP / 64 {
                let to = &mut tile[64 * (GROUP * part + row)..][..64];
                match row_of {
                    Some(x) => to.copy_from_slice(&x.q[STEP * b + 64 * part..][..64]),
                    None => to.fill(0),
                }
            }
        }
    }
    room
}

/// 256 weights of each of [`ROWS`] rows times their sub-blocks' scales, as [`Panel::values`] lie: the lower 8 bits,
/// unsigned, and the upper 8, signed.
#[repr(C, align(64))]
struct Planes {
    low: [[u8; 4 * ROWS]; STEP / 4],
    high: [[u8; 4 * ROWS]; STEP / 4],
}

impl Planes {
    const EMPTY: Planes =
        Planes { low: [[0; 4 * ROWS]; STEP / 4], high: [[0; 4 * ROWS]; STEP / 4] };

    #[inline]
    #[target_feature(enable = "avx2,avx512f,avx512bw")]
    fn fill<U: Unpack>(&mut self, panel: &Panel) {
        const ODD: u64 = 0xaaaa_aaaa_aaaa_aaaa;
        for (sub, scales) in panel.scales[..STEP / U::SUB].iter().enumerate() {
            // The scale in every other byte: `maddubs` multiplies the values there and adds nothing.
            let even = vectors(scales).map(|scale| {
                let scale = _mm512_and_si512(scale, _mm512_set1_epi32(0xff));
                _mm512_or_si512(scale, _mm512_slli_epi32::<16>(scale))
            });
            let odd = even.map(|scale| _mm512_slli_epi16::<8>(scale));
            for at in U::SUB / 4 * sub..U::SUB / 4 * (sub + 1) {
                for half in 0..2 {
                    // SAFETY: 64 bytes are there, in each of the three.
                    unsafe {
                        let w = load(panel.values[at].as_ptr().add(64 * half));
                        let even = _mm512_maddubs_epi16(w, even[half]);
                        let odd = _mm512_maddubs_epi16(w, odd[half]);
                        let low = _mm512_mask_blend_epi8(ODD, even, _mm512_slli_epi16::<8>(odd));
                        let high = _mm512_mask_blend_epi8(ODD, _mm512_srli_epi16::<8>(even), odd);
                        _mm512_store_si512(self.low[at].as_mut_ptr().add(64 * half).cast(), low);
                        _mm512_store_si512(self.high[at].as_mut_ptr().add(64 * half).cast(), high);
                    }
                }
            }
        }
    }

    /// The products of both planes with a group's block of [`packed`].
    ///
    /// # Safety
    /// The machine has tiles, and they are [configured](configure).
    #[inline]
    unsafe fn multiply(&self, x: &[i8; GROUP_BYTES], products: &mut Products) {
        // SAFETY: by the caller. Reads a tile of activations and four of weights for each 64 values, and writes four of
        // products.
        unsafe {
            asm!(
                "tilezero tmm0",
                "tilezero tmm1",
                "tilezero tmm2",
                "tilezero tmm3",
                "2:",
                "tileloadd tmm4, [{x} + {line}]",
                "tileloadd tmm5, [{w} + {two_lines}]",
                "tdpbsud tmm0, tmm4, tmm5",
                "tileloadd tmm6, [{w} + {two_lines} + 64]",
                "tdpbsud tmm1, tmm4, tmm6",
                "tileloadd tmm5, [{w} + {two_lines} + {plane}]",
                "tdpbssd tmm2, tmm4, tmm5",
                "tileloadd tmm6, [{w} + {two_lines} + {plane} + 64]",
                "tdpbssd tmm3, tmm4, tmm6",
                "add {x}, 1024",
                "add {w}, 2048",
                "dec {steps}",
                "jnz 2b",
                "tilestored [{out} + {line}], tmm0",
                "tilestored [{out} + {line} + 1024], tmm1",
                "tilestored [{out} + {line} + 2048], tmm2",
                "tilestored [{out} + {line} + 3072], tmm3",
                x = inout(reg) x.as_ptr() => _,
                w = inout(reg) std::ptr::from_ref(self) => _,
                steps = inout(reg) STEP / 64 => _,
                out = in(reg) products.0.as_mut_ptr(),
                line = in(reg) 64usize,
                two_lines = in(reg) 128usize,
                plane = const offset_of!(Planes, high),
                out("tmm0") _, out("tmm1") _, out("tmm2") _, out("tmm3") _,
                out("tmm4") _, out("tmm5") _, out("tmm6") _,
                options(nostack),
            );
        }
    }
}

/// Integers, `[lower and upper plane][weight rows / 16][activation row][weight row]`.
#[repr(C, align(64))]
struct Products([[[[i32; 16]; GROUP]; ROWS / 16]; 2]);

impl Products {
    const EMPTY: Products = Products([[[[0; 16]; GROUP]; ROWS / 16]; 2]);

    /// Adds them, which are of block `b`, to the sums of the activation rows `x`.
    ///
    /// # Safety
    /// Each `x` has it, and `out` is the tile's for the first of them.
    #[inline]
    #[target_feature(enable = "avx2,fma,f16c,avx512f,avx512bw,avx512dq,avx512vl,avx512vnni")]
    unsafe fn finish<U: Unpack>(
        &self,
        panel: &Panel,
        x: &[ActRow<'_>],
        b: usize,
        sums: &mut [Lanes],
        out: Out,
    ) {
        let (fours, rest) = x.as_chunks::<4>();
        let (four_sums, rest_sums) = sums.as_chunks_mut::<4>();
        // SAFETY: by the caller.
        unsafe {
            for (i, (x, sums)) in fours.iter().zip(four_sums).enumerate() {
                finish::<U, 4>(panel, x, b, self.rows(4 * i), sums, out.row(4 * i));
            }
            let rest = rest.as_chunks::<1>().0.iter().zip(rest_sums.as_chunks_mut::<1>().0);
            for (i, (x, sums)) in (4 * fours.len()..).zip(rest) {
                finish::<U, 1>(panel, x, b, self.rows(i), sums, out.row(i));
            }
        }
    }

    /// Activation rows `first` and on.
    #[inline]
    #[target_feature(enable = "avx512f")]
    fn rows<const N: usize>(&self, first: usize) -> [[__m512i; 2]; N] {
        let mut ints = [[_mm512_setzero_si512(); 2]; N];
        for n in 0..N {
            for half in 0..2 {
                // SAFETY: 64 bytes are there.
                let [low, high] = self
                    .0
                    .each_ref()
                    .map(|plane| unsafe { load(plane[half][first + n].as_ptr().cast()) });
                ints[n][half] = _mm512_add_epi32(low, _mm512_slli_epi32::<8>(high));
            }
        }
        ints
    }
}

/// Makes all eight tiles 16 rows of 64 bytes.
///
/// # Safety
/// The machine has tiles, and this process may use them.
#[inline]
unsafe fn configure() {
    /// Palette 1, then each tile's bytes a row and rows: "Tile Configuration" of Intel's manual, volume 1, chapter 18.
    #[repr(C)]
    struct Config {
        palette: u8,
        start_row: u8,
        reserved: [u8; 14],
        row_bytes: [u16; 16],
        rows: [u8; 16],
    }
    const USED: usize = 8;
    let mut config =
        Config { palette: 1, start_row: 0, reserved: [0; 14], row_bytes: [0; 16], rows: [0; 16] };
    config.row_bytes[..USED].fill(64);
    config.rows[..USED].fill(GROUP as u8);
    // SAFETY: by the caller; 64 bytes are read.
    unsafe {
        asm!(
            "ldtilecfg [{}]", in(reg) &config,
            out("tmm0") _, out("tmm1") _, out("tmm2") _, out("tmm3") _,
            out("tmm4") _, out("tmm5") _, out("tmm6") _, out("tmm7") _,
            options(nostack, readonly, preserves_flags)
        );
    }
}
