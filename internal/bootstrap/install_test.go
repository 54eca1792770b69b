package bootstrap

import (
	"context"
	"errors"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"testing"
	"testing/synctest"

	"go.uber.org/zap"

	"github.com/service-proxy-agent/service-proxy-agent/internal/layout"
	"github.com/service-proxy-agent/service-proxy-agent/internal/progress"
)

// A failed installation is tried again from the first folder that can run the archive, and leaves
// no copy behind: not in a folder that cannot, and not once somebody's installation has succeeded.
func TestInstallIsTriedAgainWhereItCanRun(t *testing.T) {
	t.Setenv("GCE_METADATA_HOST", "127.0.0.1:1") // refused: nobody is told
	for _, tt := range []struct {
		name   string
		noexec []string
		want   string // where it is tried again
	}{
		{"disk", nil, "/var/lib/service-proxy-agent-archive"},
		{"noexec disk", []string{"/var/"}, "/run/service-proxy-agent-archive"},
		{"both noexec", []string{"/var/", "/run/"}, ""},
	} {
		t.Run(tt.name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				root, archive := t.TempDir(), t.TempDir()
				write := func(path string) {
					if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
						t.Fatal(err)
					}
					if err := os.WriteFile(path, nil, 0o755); err != nil {
						t.Fatal(err)
					}
				}
				write(filepath.Join(archive, runtime.GOARCH, "service-proxy-agent"))
				mkdir(t, filepath.Join(root, "run"), 0o755)
				// a file where a folder must be: it cannot be installed
				write(filepath.Join(root, "usr/local/bin"))
				var ran []string
				loaded := false // the unit that tries again
				command := func(_ context.Context, cmd *exec.Cmd) error {
					line := strings.ReplaceAll(strings.Join(cmd.Args, " "), root, "")
					ran = append(ran, line)
					if slices.ContainsFunc(tt.noexec, func(dir string) bool {
						return strings.HasPrefix(line, dir)
					}) {
						return os.ErrPermission
					}
					switch {
					case line == "systemctl stop "+retryUnit:
						loaded = false
					case strings.HasPrefix(line, "systemd-run ") && loaded:
						return errors.New("exit status 1") // as systemd-run: "was already loaded"
					case strings.HasPrefix(line, "systemd-run "):
						loaded = true
					case strings.HasSuffix(line, "/service-proxy-agent version") && loaded:
						t.Errorf("%q, while what tries again runs it", line)
					}
					return nil
				}
				install := func(dir string) error {
					return Install(t.Context(), Options{Root: root, Log: zap.NewNop(), command: command,
						look: fineSystem}, dir)
				}
				err := install(archive)
				if err == nil || strings.Contains(err.Error(), "not tried again") != (tt.want == "") {
					t.Error(err)
				}
				started := slices.ContainsFunc(ran, func(line string) bool {
					return strings.HasPrefix(line, "systemd-run ") &&
						strings.HasSuffix(line, " "+filepath.Join(tt.want, runtime.GOARCH, "service-proxy-agent")+
							" bootstrap --archive "+tt.want)
				})
				if started != (tt.want != "") {
					t.Errorf("ran %q, want it tried again in %q", ran, tt.want)
				}
				for _, path := range retryDirs {
					if _, err := os.Stat(filepath.Join(root, path)); (err == nil) != (path == tt.want) {
						t.Errorf("%s: %v", path, err)
					}
				}
				// Another archive that fails takes its place.
				if err := install(archive); err == nil || strings.Contains(err.Error(), "not tried again") != (tt.want == "") {
					t.Error(err)
				}
				// What is tried again and fails again keeps its copy.
				if tt.want != "" {
					if err := install(filepath.Join(root, tt.want)); err == nil {
						t.Error("installed")
					}
					if _, err := os.Stat(filepath.Join(root, tt.want)); err != nil {
						t.Error(err)
					}
				}
				done, err := Remove(t.Context(), Options{Root: root, command: command},
					func(context.Context) ([]string, error) { return nil, nil })
				if err != nil || slices.Contains(done, "removed "+tt.want) != (tt.want != "") {
					t.Errorf("removed %q, %v", done, err)
				}
				if tt.want != "" && !slices.Contains(ran, "systemctl stop "+retryUnit) {
					t.Errorf("ran %q: nobody stopped what tries again", ran)
				}
			})
		})
	}
}

// Rules without an Envoy would cut the VM off: where they cannot be taken out, nothing else is.
func TestRemoveLeavesAllWhereRulesStay(t *testing.T) {
	root := t.TempDir()
	mkdir(t, filepath.Join(root, "run"), 0o755)
	paths := []string{EnvoyConfig, layout.Here.Agent}
	for _, path := range paths {
		if err := os.MkdirAll(filepath.Dir(filepath.Join(root, path)), 0o755); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(filepath.Join(root, path), nil, 0o755); err != nil {
			t.Fatal(err)
		}
	}
	remove := func(why error) ([]string, error) {
		return Remove(t.Context(), Options{Root: root}, func(context.Context) ([]string, error) {
			return []string{"removed a chain"}, why
		})
	}
	done, err := remove(errors.New("the lock is held"))
	if err == nil || !strings.Contains(err.Error(), "the lock is held") ||
		!strings.Contains(err.Error(), "Envoy was left running") || len(done) != 1 {
		t.Errorf("done %q, %v", done, err)
	}
	for _, path := range paths {
		if _, err := os.Stat(filepath.Join(root, path)); err != nil {
			t.Error(err)
		}
	}
	if done, err := remove(nil); err != nil || len(done) < 1+len(paths) {
		t.Errorf("done %q, %v", done, err)
	}
	for _, path := range paths {
		if _, err := os.Stat(filepath.Join(root, path)); err == nil {
			t.Errorf("left behind: %s", path)
		}
	}
}

// TestRemoveAgain: where something could not be removed, the next try still knows what is ours, and
// has the program that tries.
func TestRemoveAgain(t *testing.T) {
	v := newFakeVM(t)
	v.install("1", "")
	v.put(EnvoyBinary, "an Envoy of ours")
	mkdir(t, filepath.Join(v.root, progress.StateDir), 0o755)
	state := progress.State{PrimarySum: "sum", MadeUsers: []string{AgentUser, EnvoyUser}}
	if err := progress.Write(filepath.Join(v.root, progress.StateDir), state); err != nil {
		t.Fatal(err)
	}
	busy := true
	there := map[string]bool{AgentUser: true, EnvoyUser: true}
	opts := v.options()
	opts.command = func(ctx context.Context, cmd *exec.Cmd) error {
		if name := cmd.Args[len(cmd.Args)-1]; filepath.Base(cmd.Args[0]) == "userdel" {
			switch {
			case !there[name]: // as userdel's man page has it
				return exec.CommandContext(ctx, "sh", "-c", "exit 6").Run()
			case name == EnvoyUser && busy:
				return exec.CommandContext(ctx, "sh", "-c", "exit 8").Run()
			}
			delete(there, name)
		}
		return nil
	}
	remove := func() ([]string, error) {
		return Remove(t.Context(), opts, func(context.Context) ([]string, error) { return nil, nil })
	}
	if done, err := remove(); err == nil || !slices.Contains(done,
		"left "+progress.StateDir+" and "+layout.Here.Agent+", to try again with") {
		t.Errorf("done %q, %v", done, err)
	}
	v.put(EnvoyBinary, "it could not be removed either")
	busy = false
	done, err := remove()
	if err != nil || len(there) > 0 {
		t.Errorf("done %q, %v; users %v", done, err, there)
	}
	for _, path := range []string{EnvoyBinary, layout.Here.Agent, progress.StateDir} {
		if _, err := os.Lstat(filepath.Join(v.root, path)); err == nil {
			t.Errorf("%s is left: %q", path, done)
		}
	}
}
