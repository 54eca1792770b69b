package bootstrap

import (
	"context"
	"encoding/json"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/service-proxy-agent/service-proxy-agent/internal/logs"
	"github.com/service-proxy-agent/service-proxy-agent/internal/progress"
)

// plants are what the owner of a folder, who is not trusted, may put in a file's place there.
var plants = map[string]func(t *testing.T, name string){
	"link": func(t *testing.T, name string) {
		target := filepath.Join(t.TempDir(), "target")
		write(t, target, `{"status": "FINISHED", "made_users": ["envoy"], "primary_sum": "x"}`)
		link(t, target, name)
	},
	"FIFO": func(t *testing.T, name string) {
		if err := unix.Mkfifo(name, 0o600); err != nil {
			t.Fatal(err)
		}
	},
	"FIFO with a writer": func(t *testing.T, name string) {
		if err := unix.Mkfifo(name, 0o600); err != nil {
			t.Fatal(err)
		}
		// It opens at once, and whoever reads waits for what it never writes.
		f, err := os.OpenFile(name, os.O_RDWR, 0)
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { f.Close() })
	},
	"folder": func(t *testing.T, name string) { mkdir(t, filepath.Join(name, "full"), 0o755) },
	"huge file": func(t *testing.T, name string) {
		write(t, name, "")
		if err := os.Truncate(name, 4<<30); err != nil {
			t.Fatal(err)
		}
	},
	"second name of another's file": func(t *testing.T, name string) {
		target := filepath.Join(filepath.Dir(name), "another's")
		write(t, target, `{"status": "FINISHED", "made_users": ["envoy"], "primary_sum": "x"}`)
		if err := os.Link(target, name); err != nil {
			t.Fatal(err)
		}
	},
}

// within fails the test, instead of hanging it, where do does not end.
func within(t *testing.T, limit time.Duration, do func()) {
	t.Helper()
	ended := make(chan struct{})
	go func() {
		defer close(ended)
		do()
	}()
	select {
	case <-ended:
	case <-time.After(limit):
		t.Fatal("it hangs")
	}
}

// Root reads files that other users can replace: nothing they put there hangs it, fills its memory,
// or is believed.
func TestPlantedFiles(t *testing.T) {
	for what, plant := range plants {
		t.Run(what, func(t *testing.T) {
			b := newBootstrapper(Options{Root: t.TempDir()})
			for _, dir := range []string{progress.StateDir, progress.RuntimeDir, logs.Dir, "/srv"} {
				mkdir(t, b.path(dir), 0o755)
			}
			within(t, 10*time.Second, func() {
				plant(t, b.path(progress.StateDir+"/"+progress.StateFile))
				if state, err := progress.Read(b.path(progress.StateDir)); err == nil {
					t.Errorf("the state is believed: %+v", state)
				}
				plant(t, b.path(logs.Dir+"/envoy.err.log"))
				if have := b.lastLogLine(""); strings.Contains(have, "made_users") {
					t.Errorf("another's file is shown: %q", have)
				}
				// The rest is as the attribute wants it.
				if strings.HasPrefix(what, "FIFO") || what == "folder" {
					plant(t, b.path("/srv/envoy.tgz"))
					into, err := os.Create(filepath.Join(t.TempDir(), "into"))
					if err != nil {
						t.Error(err)
						return
					}
					defer into.Close()
					if err := b.download(t.Context(), "file://"+b.path("/srv/envoy.tgz"), into); err == nil {
						t.Error("it is an archive")
					}
				}
				plant(t, b.path(progress.RuntimeDir+"/"+progress.RequestFile))
				b.takeRequest()
				if _, err := os.Lstat(b.path(progress.RuntimeDir + "/" + progress.RequestFile)); err == nil {
					t.Error("the request stays, and bootstrap never pauses")
				}
			})
		})
	}
}

// The state is in a folder of the daemon's user: what it names as users to remove can be anything.
func TestRemoveUsers(t *testing.T) {
	root := t.TempDir()
	mkdir(t, filepath.Join(root, "run"), 0o755)
	mkdir(t, filepath.Join(root, progress.StateDir), 0o755)
	text, err := json.Marshal(progress.State{
		MadeUsers: []string{"--root=/tmp/x", "root", "", EnvoyUser, "postgres", AgentUser, EnvoyUser}})
	if err != nil {
		t.Fatal(err)
	}
	write(t, filepath.Join(root, progress.StateDir, progress.StateFile), string(text))
	var ran []string
	opts := Options{Root: root, command: func(_ context.Context, cmd *exec.Cmd) error {
		ran = append(ran, strings.Join(cmd.Args, " "))
		return nil
	}}
	if _, err := Remove(t.Context(), opts, func(context.Context) ([]string, error) {
		return nil, nil
	}); err != nil {
		t.Error(err)
	}
	want := "userdel " + AgentUser + "; userdel " + EnvoyUser
	if have := strings.Join(ran, "; "); have != want {
		t.Errorf("ran %q, want %q", have, want)
	}
}
