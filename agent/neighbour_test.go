package agent

import (
	"os"
	"testing"

	"github.com/google/go-cmp/cmp"

	"github.com/service-proxy-agent/service-proxy-agent/internal/neighbour"
	"github.com/service-proxy-agent/service-proxy-agent/internal/symptom"
	"github.com/service-proxy-agent/service-proxy-agent/systemd"
)

func TestClosedAgent(t *testing.T) {
	const path = "/etc/systemd/system/service-proxy-agent.service"
	first := []neighbour.Unit{{Path: path, Program: "/opt/agent", First: true}}
	behind := []neighbour.Unit{{Path: "/lib/systemd/system/service-proxy-agent.service", Program: "/opt/agent"}}
	theirs := neighbour.Process{PID: 7, Program: "/opt/agent", Unit: systemd.AgentUnit,
		Args: []string{"/opt/agent", "--secret=x"}}
	ours := neighbour.Process{PID: 8, Program: "/usr/local/bin/service-proxy-agent",
		Unit: systemd.AgentUnit, Args: []string{"service-proxy-agent", "run"}}
	active := systemd.State{Active: "active", MainPID: 7, Enabled: true}
	self := systemd.State{Active: "active", MainPID: os.Getpid(), Enabled: true}
	for _, tt := range []struct {
		name  string
		units []neighbour.Unit
		all   []neighbour.Process
		unit  systemd.State
		want  *symptom.ClosedAgent
	}{
		{"nothing", nil, nil, self, nil},
		{"ours alone", nil, []neighbour.Process{ours}, active, nil},
		{"a file behind ours", behind, []neighbour.Process{ours}, active, nil},
		{"it runs behind ours", behind, []neighbour.Process{theirs}, active,
			&symptom.ClosedAgent{Process: "7 /opt/agent"}},
		{"it runs", first, []neighbour.Process{theirs}, active, &symptom.ClosedAgent{
			Unit: path + ", active", Starts: true, Binary: "/opt/agent", Process: "7 /opt/agent"}},
		{"it runs, and its processes are hidden", first, nil, active, &symptom.ClosedAgent{
			Unit: path + ", active", Starts: true, Binary: "/opt/agent"}},
		{"the daemon of ours sees its file", first, nil, self, &symptom.ClosedAgent{
			Unit:   path + ", in place of ours from the next start of that unit on",
			Starts: true, Binary: "/opt/agent"}},
		{"doctor sees that ours runs", first, []neighbour.Process{ours},
			systemd.State{Active: "active", MainPID: 8, Enabled: true}, &symptom.ClosedAgent{
				Unit:   path + ", in place of ours from the next start of that unit on",
				Starts: true, Binary: "/opt/agent"}},
		{"it is not enabled", first, nil, systemd.State{Active: "inactive"},
			&symptom.ClosedAgent{Unit: path, Binary: "/opt/agent"}},
		{"it is enabled", first, nil, systemd.State{Active: "inactive", Enabled: true},
			&symptom.ClosedAgent{Unit: path + ", enabled", Starts: true, Binary: "/opt/agent"}},
		{"a process alone", nil, []neighbour.Process{theirs}, systemd.State{Active: "active"},
			&symptom.ClosedAgent{Process: "7 /opt/agent"}},
	} {
		if diff := cmp.Diff(tt.want, closedAgent(tt.units, tt.all, tt.unit, "")); diff != "" {
			t.Errorf("%s (-want +have)\n%s", tt.name, diff)
		}
	}
	// What others write is a mark beside others, and none alone: anybody may.
	if c := closedAgent(first, nil, self, "agent-status: \"x\""); c.Writes != "agent-status: \"x\"" {
		t.Errorf("%+v", c)
	}
	if c := closedAgent(nil, nil, self, "agent-status: \"x\""); c != nil {
		t.Errorf("%+v", c)
	}
}
