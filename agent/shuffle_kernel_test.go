//go:build kernel

package agent

import (
	"context"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/service-proxy-agent/service-proxy-agent/iptables"
)

// kernelSequences is how many sequences are played on the kernel: the first ones of TestShuffled.
const kernelSequences = 50

// TestShuffledOnTheKernel plays sequences of TestShuffled on the kernel's nat tables, by each
// backend. The time is the test's: only programs take any.
func TestShuffledOnTheKernel(t *testing.T) {
	for _, backend := range []string{iptables.NFT, iptables.Legacy} {
		t.Run(backend, func(t *testing.T) {
			t.Parallel()
			runtime.LockOSThread() // and never unlocked: the thread ends with its namespace
			if err := unix.Unshare(unix.CLONE_NEWNET); err != nil {
				t.Fatal("needs root: it makes a network namespace: ", err)
			}
			k := newInKernel(t, backend)
			first, count := 0, kernelSequences
			switch {
			case *shuffledCount > 0:
				count = *shuffledCount
			case os.Getenv("SOAK") == "1":
				count = 20 * kernelSequences
			}
			if *shuffledSeed >= 0 {
				first, count = int(*shuffledSeed), 1
			}
			for seed := range count {
				k.clear()
				if play(t, uint64(first+seed), k, true) == nil {
					return
				}
			}
		})
	}
}

// inKernel is the nat table of the kernel. The agent runs the real programs behind scripts that
// count their runs and can fail in their place.
type inKernel struct {
	t     *testing.T
	name  string // of the backend
	dir   string
	clock time.Time
	own   [2]int // writes of the test
	seen  [2]struct {
		at     int
		chains tables
	}
}

func newInKernel(t *testing.T, backend string) *inKernel {
	k := &inKernel{t: t, name: backend, dir: t.TempDir(), clock: time.Unix(1e9, 0).UTC()}
	for _, f := range bothFamilies {
		for _, kind := range []string{"", "-save", "-restore"} {
			program := k.program(f) + kind
			script := strings.NewReplacer("KIND", strings.TrimPrefix(kind, "-"), "PROGRAM", program,
				"$d", k.file(f, "")).Replace(programScript)
			if err := os.WriteFile(filepath.Join(k.dir, program), []byte(script), 0o755); err != nil {
				t.Fatal(err)
			}
		}
	}
	return k
}

func (k *inKernel) program(f iptables.Family) string {
	return []string{"iptables-", "ip6tables-"}[index(f)] + k.name
}

func (k *inKernel) file(f iptables.Family, what string) string {
	return strings.TrimSuffix(filepath.Join(k.dir, f.String()+"-"+what), "-")
}

// programScript stands before a program. Each line that it adds to a file counts one run.
const programScript = `#!/bin/sh
kind=KIND
case "$kind $*" in *--version*) exec /usr/sbin/PROGRAM "$@" ;; esac
case $kind in
restore) echo >>$d-writes ;;
save) echo >>$d-reads; echo >>$d-looks ;;
*) echo >>$d-looks ;;
esac
[ ! -e $d-fault ] || . $d-fault
exec /usr/sbin/PROGRAM "$@"
`

// faultScripts are what stands in the place of a program that fails. What is refused is told as by
// a kernel without the match, by the line.
var faultScripts = map[fault]string{
	locked: `case $kind in restore)
	echo "` + saysLocked + `" >&2; echo >>$d-failed; exit 4 ;;
esac
`,
	absent: "cat <<'END' >&2\n" + saysAbsent + "\nEND\necho >>$d-failed; exit 3\n",
	refuses: `case $kind in restore)
	cat >$d-payload
	n=$(grep -n -m1 -e '-m comment' $d-payload | cut -d: -f1)
	if [ -n "$n" ]; then echo "line $n: ` + saysRefused + `" >&2; echo >>$d-failed; exit 4; fi
	exec <$d-payload ;;
esac
`,
}

func (k *inKernel) fault(f iptables.Family, how fault) {
	if how == works {
		if err := os.Remove(k.file(f, "fault")); err != nil && !os.IsNotExist(err) {
			k.t.Fatal(err)
		}
		return
	}
	script := strings.ReplaceAll(faultScripts[how], "$d", k.file(f, ""))
	if err := os.WriteFile(k.file(f, "fault"), []byte(script), 0o644); err != nil {
		k.t.Fatal(err)
	}
}

// count is how many lines a file of a script holds, each of one byte.
func (k *inKernel) count(f iptables.Family, what string) int {
	info, err := os.Stat(k.file(f, what))
	if err != nil {
		return 0
	}
	return int(info.Size())
}

func (k *inKernel) writes(f iptables.Family) int  { return k.count(f, "writes") }
func (k *inKernel) reads(f iptables.Family) int   { return k.count(f, "reads") }
func (k *inKernel) looks(f iptables.Family) int   { return k.count(f, "looks") }
func (k *inKernel) failed(f iptables.Family) int  { return k.count(f, "failed") }
func (k *inKernel) changes(f iptables.Family) int { return k.own[index(f)] + k.writes(f) }

func (k *inKernel) backend() string       { return k.name }
func (k *inKernel) now() time.Time        { return k.clock }
func (k *inKernel) sleep(d time.Duration) { k.clock = k.clock.Add(d) }

func (k *inKernel) open() (*iptables.Kernel, error) {
	return iptables.Open(context.Background(), iptables.Options{Backend: k.name, Path: k.dir})
}

func (k *inKernel) chains(f iptables.Family) tables {
	last := &k.seen[index(f)]
	if now := k.changes(f); last.chains == nil || last.at != now {
		last.at, last.chains = now, tables{}
		for line := range strings.SplitSeq(k.run("", k.program(f)+"-save", "-t", "nat"), "\n") {
			if name, ok := strings.CutPrefix(line, ":"); ok {
				name, _, _ = strings.Cut(name, " ")
				last.chains[name] = nil
			}
			if rule, ok := strings.CutPrefix(line, "-A "); ok {
				name, rule, _ := strings.Cut(rule, " ")
				last.chains[name] = append(last.chains[name], rule)
			}
		}
	}
	return last.chains
}

func (k *inKernel) restore(f iptables.Family, payload string) {
	k.own[index(f)]++
	k.run(payload, k.program(f)+"-restore", "--noflush", "-w", "5")
}

func (k *inKernel) flush(f iptables.Family) {
	k.own[index(f)]++
	k.run("", k.program(f), "-w", "5", "-t", "nat", "-F")
}

// clear makes the table as new.
func (k *inKernel) clear() {
	for _, f := range bothFamilies {
		k.fault(f, works)
		k.flush(f)
		k.run("", k.program(f), "-w", "5", "-t", "nat", "-X")
	}
}

// run runs a program of the test's own, which must succeed.
func (k *inKernel) run(stdin, program string, args ...string) string {
	cmd := exec.Command("/usr/sbin/"+program, args...)
	cmd.Stdin = strings.NewReader(stdin)
	var stderr strings.Builder
	cmd.Stderr = &stderr
	out, err := cmd.Output()
	if err != nil {
		k.t.Fatalf("%s %v: %v\n%s\n%s", program, args, err, stderr.String(), stdin)
	}
	return string(out)
}
