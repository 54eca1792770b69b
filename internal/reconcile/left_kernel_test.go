//go:build kernel

package reconcile

import (
	"os"
	"path/filepath"
	"runtime"
	"strings"
	"testing"
	"time"

	"go.uber.org/zap"
	"golang.org/x/sys/unix"

	"github.com/service-proxy-agent/service-proxy-agent/internal/conntrack"
	"github.com/service-proxy-agent/service-proxy-agent/iptables"
)

// TestRetryLeft: a rule that was refused is left out, offered again every five minutes and no
// sooner, and put in once it is taken, as after a modprobe. Here iptables itself lacks the
// comment match.
func TestRetryLeft(t *testing.T) {
	libs, err := filepath.Glob("/usr/lib/*/xtables/*.so")
	if err != nil || len(libs) == 0 {
		t.Fatal("no xtables libraries: ", err)
	}
	without := t.TempDir()
	for _, lib := range libs {
		if name := filepath.Base(lib); name != "libxt_comment.so" {
			if err := os.Symlink(lib, filepath.Join(without, name)); err != nil {
				t.Fatal(err)
			}
		}
	}
	for _, backend := range []string{iptables.NFT, iptables.Legacy} {
		t.Run(backend, func(t *testing.T) {
			runtime.LockOSThread() // and never unlocked: the thread ends with its namespace
			if err := unix.Unshare(unix.CLONE_NEWNET); err != nil {
				t.Fatal("needs root: it makes a network namespace: ", err)
			}
			k, err := iptables.Open(t.Context(), iptables.Options{Backend: backend})
			if err != nil {
				t.Fatal(err)
			}
			for _, family := range []iptables.Family{iptables.IPv4, iptables.IPv6} {
				f := New(family, k, Flows{HalfOpen: conntrack.DeleteHalfOpen}, zap.NewNop())
				f.paths.beside = func(walk func()) { walk() } // in this thread's namespace
				f.gates.outbound.open = true
				order := Order{Serial: 1, Known: true, UserKnown: true, Want: iptables.Interception{
					Family: family, ProxyUID: 107, ProxyGID: 107, OutboundPort: 15001,
					Services: prefixes("10.1.0.1/32", "fd10::1/128"),
				}}
				now := time.Now()
				// its end changes the rules, and offers the whole again
				f.goal.settling = now.Add(time.Hour)
				for _, step := range []struct {
					name    string
					after   time.Duration
					lacks   bool
					applied string // outcome; "": nothing was tried
					left    bool
				}{
					{"refused", 0, true, "refused", true},
					{"a pass later", time.Second, true, "", true},
					{"not sooner, though it would be taken now", retryLeft - 2*time.Second, false,
						"", true},
					{"refused again", 2 * time.Second, true, "refused", true},
					{"taken", retryLeft + time.Second, false, "applied", false},
					{"for good", 2 * retryLeft, false, "", false},
				} {
					now = now.Add(step.after)
					os.Unsetenv("XTABLES_LIBDIR")
					if step.lacks {
						t.Setenv("XTABLES_LIBDIR", without)
					}
					out := f.Pass(t.Context(), now, order)
					// A pass that only adopts what is there asks for the next at once.
					for out.Wake == 0 {
						out = f.Pass(t.Context(), now, order)
					}
					if err := out.Facts.Err; err != nil || !out.Status.Equal || !out.Status.Jumps {
						t.Fatalf("%v, %s: equal %v, jumps in %v: %v", family, step.name,
							out.Status.Equal, out.Status.Jumps, err)
					}
					if n := out.Applies[step.applied]; step.applied != "" && n != 1 ||
						step.applied == "" && len(out.Applies) != 0 {
						t.Errorf("%v, %s: tried %v, want %q once", family, step.name, out.Applies,
							step.applied)
					}
					all := out.Facts.Left
					left := len(all) == 1 && all[0].Rule == iptables.CommentMatch &&
						strings.Contains(all[0].Stderr, "comment")
					if left != step.left || !left && len(all) > 0 {
						t.Errorf("%v, %s: left out %v", family, step.name, all)
					}
					os.Unsetenv("XTABLES_LIBDIR")
					have, err := k.Read(t.Context(), family)
					if err != nil {
						t.Fatal(err)
					}
					if got := strings.Contains(have.Ours().String(),
						"--comment proxy-user"); got == step.left {
						t.Errorf("%v, %s: the kernel has\n%s", family, step.name, have.Ours())
					}
				}
			}
		})
	}
}
