package systemd

import (
	"context"
	"net"
	"path/filepath"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
)

func TestNotify(t *testing.T) {
	path := filepath.Join(t.TempDir(), "notify")
	conn, err := net.ListenUnixgram("unixgram", &net.UnixAddr{Name: path, Net: "unixgram"})
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	t.Setenv("NOTIFY_SOCKET", path)
	if err := Notify("READY=1", "STATUS=one\nWATCHDOG=trigger"); err != nil {
		t.Fatal(err)
	}
	buf := make([]byte, 100)
	n, err := conn.Read(buf)
	if want := "READY=1\nSTATUS=one WATCHDOG=trigger"; err != nil || string(buf[:n]) != want {
		t.Errorf("have %q, %v, want %q", buf[:n], err, want)
	}
	t.Setenv("NOTIFY_SOCKET", "")
	if err := Notify("READY=1"); err != nil {
		t.Errorf("without a manager: %v", err)
	}
}

func TestParseState(t *testing.T) {
	for _, tt := range []struct {
		show string
		want State
	}{
		{"Result=signal\nNRestarts=3\nExecMainCode=2\nExecMainStatus=9\nMainPID=0\nLoadState=loaded\nActiveState=activating\nSubState=auto-restart\nUnitFileState=enabled\nStateChangeTimestamp=@1700000000\n",
			State{Load: "loaded", Active: "activating", Sub: "auto-restart", Result: "signal", ExitCode: -1,
				ExitSignal: 9, Restarts: 3, Enabled: true, Since: time.Unix(1700000000, 0)}},
		{"ExecMainCode=1\nExecMainStatus=1\nUnitFileState=disabled\nStateChangeTimestamp=Tue 2023-11-14 22:13:20 UTC\n",
			State{ExitCode: 1, Since: time.Unix(1700000000, 0).UTC()}},
		{"MainPID=17\nActiveState=active\nExecMainCode=0\nExecMainStatus=0\nStateChangeTimestamp=\n", State{Active: "active", MainPID: 17, ExitCode: -1}},
		{"", State{ExitCode: -1}},
	} {
		if diff := cmp.Diff(tt.want, parseState(tt.show)); diff != "" {
			t.Errorf("%q (-want +have):\n%s", tt.show, diff)
		}
	}
}

// Without systemd's socket, or without systemctl, the answer is an error and not a state.
func TestUnitStateWithoutSystemd(t *testing.T) {
	t.Setenv("PATH", t.TempDir())
	if state, err := UnitState(context.Background(), "x.service"); err == nil {
		t.Errorf("have %v and no error", state)
	}
}
