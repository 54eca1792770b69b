//go:build kernel

package agent

import (
	"os"
	"path/filepath"
	"runtime"
	"strings"
	"testing"
	"time"

	"go.uber.org/zap"
	"golang.org/x/sys/unix"

	"github.com/service-proxy-agent/service-proxy-agent/iptables"
)

// TestRetryLeft: a rule that was refused is left out, offered again every five minutes and no sooner,
// and put in once it is taken, as after a modprobe. Here iptables itself lacks the comment match.
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
			a := &Agent{log: zap.NewNop(), kernel: k, wantSerial: 1}
			for i, s := range []*familyState{{family: iptables.IPv4}, {family: iptables.IPv6}} {
				s.outbound.open = true
				a.want.Families[i] = iptables.Interception{Family: s.family, ProxyUID: 107, ProxyGID: 107, OutboundPort: 15001, Services: prefixes("10.1.0.1/32", "fd10::1/128")}
				now := time.Now()
				s.settling = now.Add(time.Hour) // its end changes the rules, and offers the whole again
				for _, step := range []struct {
					name    string
					after   time.Duration
					lacks   bool
					applied string // outcome; "": nothing was tried
					left    bool
				}{
					{"refused", 0, true, "refused", true},
					{"a pass later", time.Second, true, "", true},
					{"not sooner, though it would be taken now", retryLeft - 2*time.Second, false, "", true},
					{"refused again", 2 * time.Second, true, "refused", true},
					{"taken", retryLeft + time.Second, false, "applied", false},
					{"for good", 2 * retryLeft, false, "", false},
				} {
					now = now.Add(step.after)
					os.Unsetenv("XTABLES_LIBDIR")
					if step.lacks {
						t.Setenv("XTABLES_LIBDIR", without)
					}
					for a.reconcile(t.Context(), now, s, a.want.Families[i], true) == 0 {
						// A pass that only adopts what is there asks for the next at once.
					}
					if s.err != nil || !s.equal || !s.jumpsIn {
						t.Fatalf("%v, %s: equal %v, jumps in %v: %v", s.family, step.name, s.equal, s.jumpsIn, s.err)
					}
					if n := s.applies[step.applied]; step.applied != "" && n != 1 || step.applied == "" && len(s.applies) != 0 {
						t.Errorf("%v, %s: tried %v, want %q once", s.family, step.name, s.applies, step.applied)
					}
					left := len(s.left) == 1 && s.left[0].Rule == iptables.CommentMatch && strings.Contains(s.left[0].Stderr, "comment")
					if left != step.left || !left && len(s.left) > 0 {
						t.Errorf("%v, %s: left out %v", s.family, step.name, s.left)
					}
					os.Unsetenv("XTABLES_LIBDIR")
					have, err := k.Read(t.Context(), s.family)
					if err != nil {
						t.Fatal(err)
					}
					if got := strings.Contains(have.Ours().String(), "--comment proxy-user"); got == step.left {
						t.Errorf("%v, %s: the kernel has\n%s", s.family, step.name, have.Ours())
					}
				}
			}
		})
	}
}
