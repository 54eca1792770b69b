package status

import (
	"bytes"
	"encoding/json"
	"flag"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"
	"unicode"

	"github.com/google/go-cmp/cmp"

	"github.com/service-proxy-agent/service-proxy-agent/internal/symptom"
	"github.com/service-proxy-agent/service-proxy-agent/internal/terminal"
	"github.com/service-proxy-agent/service-proxy-agent/internal/terminal/terminaltest"
	"github.com/service-proxy-agent/service-proxy-agent/test/schema"
)

var update = flag.Bool("update", false, "write the goldens anew")

// noon is when the goldens are looked at.
var noon = time.Date(2026, 11, 28, 12, 0, 0, 0, time.UTC)

func ago(d time.Duration) time.Time { return noon.Add(-d) }

// well is the status of a healthy VM.
func well() Status {
	family := func(name string, prefixes int) Family {
		return Family{Family: name, Usable: true, Equal: true, Jumps: true, Services: prefixes, Rules: 24,
			OutboundPort: 15001, InboundPort: 15006, Applied: ago(10 * time.Minute),
			Shape: &Shape{Jumps: true, Inbound: true}}
	}
	s := Status{
		Version: "1.2.3", Heartbeat: ago(400 * time.Millisecond), Started: ago(3 * time.Hour),
		Mode: "intercepting", Ready: true, Since: ago(3 * time.Hour), Passes: 10800,
		Bootstrap: Bootstrap{Status: "FINISHED", Done: true}, Attribute: &Attribute{Read: ago(3 * time.Hour)},
		Envoy: Envoy{Admin: "127.0.0.1:15000", State: "LIVE", Number: "1.40.0", Configured: true,
			Version: "f18ff6d2ab4e7d7b4cc4ba0b3a3a8ab4d3dc42a4/1.40.0/Clean/RELEASE/BoringSSL", Listeners: 5,
			Node: "projects/123456/networks/default/nodes/3f0c4a4e-6f1a-4b2c-9c55-8f3f2a6f7d10"},
		ControlPlane: ControlPlane{Known: true, Connected: true, Since: ago(3 * time.Hour),
			Target: "trafficdirector.googleapis.com:443", Heard: ago(10 * time.Minute),
			Closed: &Close{Time: ago(4 * time.Hour), Code: 14, Message: "upstream connect error",
				Target: "trafficdirector.googleapis.com:443"}},
		Backend: "nft", Families: []Family{family("IPv4", 2), family("IPv6", 1)},
		Services: []Service{{"cart", []string{"10.10.0.1:80", "[fd10::1]:80"}},
			{"checkout", []string{"10.10.0.7:80"}}, {"mail", []string{"*:2525"}}},
		ServingPorts: []uint16{80, 8443},
		Channels: []Channel{
			{Name: "guest_attributes", Enabled: true, Up: true, Last: ago(20 * time.Second), Written: 184,
				Failures: 1, Budget: Budget{Unit: "queries", Left: 2.4, Most: 3, PerMinute: 3}},
			{Name: "serial", Enabled: true, Up: true, Last: ago(10 * time.Minute), Written: 12,
				Budget: Budget{Unit: "lines", Left: 64, Most: 64}},
			{Name: "cloud_logging", Error: "--cloud-logging=off"},
		},
		Cost: Cost{EnvoyShare: .0021, CPUShare: .0038, Window: 60, Resident: 31 << 20,
			Bucket: Bucket{Level: 5.96, Size: 6, Share: .1}, Questions: []Question{
				{Name: "dump", Count: 2, Seconds: .0031}, {Name: "look", Count: 10800, Seconds: 11.2, Recent: .0621},
				{Name: "ready", Count: 10800, Seconds: 6.4, Recent: .0352},
				{Name: "server_info", Count: 4, Seconds: .0092}, {Name: "bootstrap"},
				{Name: "stats", Count: 720, Seconds: 1.3, Recent: .0074},
				{Name: "clusters", Count: 1080, Seconds: 3.6, Recent: .0204}}},
		History: []Transition{
			{Time: ago(3 * time.Hour), Kind: OfAgent, Severity: "info", Text: "service-proxy-agent 1.2.3 started"},
			{Time: ago(3 * time.Hour), Kind: OfMode, Severity: "info", Text: "interception: intercepting"},
			{Time: ago(10 * time.Minute), Kind: OfServices, Severity: "info",
				Text: "service found: checkout (10.10.0.7:80)"}},
	}
	for i := range 60 {
		s.Samples = append(s.Samples, Sample{Time: ago(time.Duration(60-i) * time.Minute), State: "ready",
			Passes: 60, SlowestPass: .004})
	}
	s.Samples[49].Changes, s.Samples[49].SlowestChange, s.Samples[49].SlowestPass = 1, .0412, .0312
	return s
}

var down = symptom.Finding{ID: symptom.EnvoyDown, Row: 1, Severity: symptom.Error,
	Cause:    "Envoy is not running: nothing accepts on its admin address 127.0.0.1:15000 since 2026-11-28T11:57:00Z",
	Next:     "see `systemctl status service-proxy-envoy` and /var/log/envoy/envoy.err.log",
	Since:    ago(3 * time.Minute),
	Commands: []string{"systemctl status service-proxy-envoy", "gcloud compute ssh web-1 --project=my-project --zone=europe-west4-a --command='sudo service-proxy-agent doctor'"}}

func envoyDown(s *Status) {
	closed := symptom.Finding{ID: symptom.InterceptionNotReady, Severity: symptom.Error,
		Key: "127.0.0.1:15001", ExplainedBy: symptom.EnvoyDown,
		Cause: "Envoy does not accept on port 15001 (outbound interception)",
		Next:  "it goes on by itself once Envoy does", Since: ago(3 * time.Minute)}
	s.Findings = []symptom.Finding{down, closed}
	s.Ready, s.NotReady, s.Since = false, "Envoy: dial tcp 127.0.0.1:15000: connect: connection refused", ago(3*time.Minute)
	s.Failing, s.LastFailure = symptom.EnvoyDown, down.Text()+" (since 2026-11-28T11:57:00Z, 1 time)"
	s.Envoy.State, s.Envoy.Down = "", ago(3*time.Minute)
	s.ControlPlane.Known, s.ControlPlane.Connected, s.ControlPlane.Since = false, false, time.Time{}
	s.History = append(s.History, Transition{Time: ago(3 * time.Minute), Kind: OfFinding,
		Severity: "error", Text: down.Text(), ID: down.ID})
}

// statuses are one of each kind that somebody looks at.
func statuses() map[string]Status {
	all := map[string]Status{}
	add := func(name string, change func(*Status)) {
		s := well()
		change(&s)
		all[name] = s
	}
	add("healthy", func(*Status) {})
	add("warned", func(s *Status) {
		s.Findings = []symptom.Finding{{ID: symptom.ListenAddress, Severity: symptom.Warning,
			Since: ago(time.Hour), Cause: "/metrics is not served", Next: "free the port"},
			{ID: symptom.OtherChain, Severity: symptom.Advice,
				Cause: "Chain DOCKER is at our hook, too", Since: ago(50 * time.Hour)}}
	})
	add("envoy-down", envoyDown)
	add("bypass", func(s *Status) {
		envoyDown(s)
		s.Mode = "bypass"
		for i := range s.Families {
			s.Families[i].Jumps = false
			s.Families[i].Shape = &Shape{Held: "the jumps, since Envoy is down (--when-envoy-down=bypass)"}
		}
	})
	add("hold", func(s *Status) { // at the first boot
		*s = Status{Version: s.Version, Heartbeat: ago(time.Second), Started: ago(20 * time.Second),
			Mode:     "hold",
			NotReady: "Envoy has not received its listeners", Since: ago(20 * time.Second),
			Bootstrap: Bootstrap{Status: "IN_PROGRESS"}, Attribute: &Attribute{Read: ago(19 * time.Second)},
			Envoy:   Envoy{Admin: s.Envoy.Admin, State: "PRE_INITIALIZING", Version: s.Envoy.Version},
			Backend: "nft", Families: []Family{{Family: "IPv4", Usable: true}, {Family: "IPv6",
				Error: "ip6tables: the table nat is not there; `modprobe ip6table_nat`"}},
			Channels: []Channel{{Name: "guest_attributes", Enabled: true, Waiting: 3,
				Budget: Budget{Unit: "queries", Left: 0, Most: 3, PerMinute: 3, Next: noon.Add(20 * time.Second)}},
				{Name: "serial", Enabled: true, Up: true, Written: 2, Budget: Budget{Unit: "lines", Left: 64, Most: 64}},
				{Name: "cloud_logging", Error: "it is not known yet whether this VM may write there"}},
			Cost: Cost{Resident: 24 << 20},
			History: []Transition{{Time: ago(20 * time.Second), Kind: OfAgent, Severity: "info",
				Text: "service-proxy-agent 1.2.3 started"}}}
	})
	add("paused", func(s *Status) {
		s.Mode, s.Paused, s.Ready, s.NotReady = "paused", true, false, "paused by cleanup until restarted"
		s.Services = nil
		for i := range s.Families {
			s.Families[i].Jumps, s.Families[i].Rules, s.Families[i].Shape = false, 0, nil
		}
	})
	brakeOn := func(s *Status) {
		s.Mode = "off"
		s.Interception = Interception{State: "off", Since: ago(20 * time.Minute), By: "project",
			WhenEnvoyDown: "keep", WhenEnvoyDownBy: "setting"}
		for i := range s.Families {
			s.Families[i].Jumps = false
			s.Families[i].Shape = &Shape{Held: "the jumps are held back: interception is off by the " +
				"metadata key service-proxy-agent-interception"}
		}
		s.History = append(s.History, Transition{Time: ago(20 * time.Minute), Kind: OfMode,
			Severity: "info", Text: "interception: off, by the project's metadata " +
				"(service-proxy-agent-interception) since 2026-11-28T11:40:00Z"})
	}
	add("off", brakeOn)
	add("off-and-down", func(s *Status) {
		envoyDown(s)
		brakeOn(s)
		s.Ready, s.NotReady, s.Interception.By = true, "", "instance"
	})
	add("bypass-by-project", func(s *Status) {
		s.Interception = Interception{State: "on", WhenEnvoyDown: "bypass", WhenEnvoyDownBy: "project"}
	})
	add("fight", func(s *Status) {
		s.Findings = []symptom.Finding{{ID: symptom.Fight, Row: 18, Severity: symptom.Error, Key: "IPv4",
			Cause: "The IPv4 rules are undone again and again by flusher.sh (4242): 37 times in the last minute",
			Next:  "stop it, or have it leave chains named SERVICE_PROXY_* alone", Since: ago(time.Minute)}}
		s.Ready, s.NotReady, s.Since = false, "the IPv4 rules are not as wanted", ago(time.Minute)
		s.Families[0].Equal, s.Families[0].Jumps = false, false
		s.Families[0].Error = "repairs wait: somebody keeps undoing them"
		s.Families[1].Left = []Left{{"-A SERVICE_PROXY_OUTPUT -m owner --uid-owner 999 -j RETURN", "Extension owner is not supported"}}
		s.Undone, s.LastDriftBy, s.LastDriftWhen = 37, "flusher.sh (4242)", ago(2*time.Second)
		for range 46 {
			s.History = append(s.History, Transition{Time: ago(40 * time.Second), Kind: OfServices,
				Severity: "info", Text: "service changed: db (10.10.0.9:3306; was 10.10.0.2:3306)"})
		}
		s.History = append(s.History, Transition{Time: ago(2 * time.Second), Kind: OfDrift,
			Severity: "warning", Text: "IPv4: rule removed from SERVICE_PROXY_OUTPUT, put back", By: "flusher.sh (4242)", Times: 37,
			First: ago(time.Minute)})
	})
	add("many", func(s *Status) {
		s.Services = nil
		for i := range 10_000 {
			s.Services = append(s.Services, Service{fmt.Sprintf("service-%05d", i),
				[]string{fmt.Sprintf("10.%d.%d.1:80", i>>8, i&255)}})
		}
		for i := range 1000 {
			s.Findings = append(s.Findings, symptom.Finding{ID: symptom.ListenerRejected,
				Severity: symptom.Error, Key: fmt.Sprint(i), Cause: fmt.Sprintf("Envoy rejected listener %q: no such file", fmt.Sprint("l", i)),
				Next: "have the control plane send a good one", Since: ago(time.Minute)})
		}
		s.ServingPorts = nil
		for i := range 30 {
			s.ServingPorts = append(s.ServingPorts, uint16(8000+i))
		}
	})
	add("starting", func(s *Status) {
		*s = Status{Version: s.Version, Started: ago(200 * time.Millisecond), Mode: "starting",
			NotReady: "no pass yet",
			Findings: []symptom.Finding{{ID: symptom.Starting, Severity: symptom.Error,
				Cause: "The agent is only just starting", Next: "ask again in a second"}}}
	})
	add("stuck", func(s *Status) { s.Heartbeat = ago(6 * time.Minute) })
	all["hostile"] = hostile("\x1b]0;owned\x07\x1b[2J\r\n" + strings.Repeat("名", 60) + "\u202e\u009b31m<b>\xff ")
	return all
}

// hostile is a Status in which every text is what others wrote.
func hostile(evil string) Status {
	s := everything()
	s.Mode, s.Version, s.NotReady, s.LastFailure = "hold", evil, evil, "it was "+evil
	s.Ready, s.Paused, s.Backend = false, false, evil
	s.Findings = []symptom.Finding{{ID: "envoy-down", Severity: symptom.Error, Cause: evil, Next: evil,
		Since: noon, Commands: []string{"echo '" + evil + "'"}},
		{ID: symptom.ID(evil), Severity: symptom.Error, Cause: evil, Next: evil, Key: evil,
			ExplainedBy: "envoy-down"}}
	s.Bootstrap = Bootstrap{Status: evil, Failure: evil}
	s.Cost.Questions = []Question{{Name: evil, Seconds: 700, Recent: 1}}
	s.Envoy = Envoy{Admin: evil, State: evil, Version: evil, Number: evil, Node: evil}
	s.ControlPlane = ControlPlane{Known: true, Target: evil, Error: evil,
		Closed: &Close{Message: evil, Target: evil}}
	s.Families = []Family{{Family: "IPv4", Usable: true, Error: evil, Shape: &Shape{Held: evil, Settling: true},
		Left: []Left{{evil, evil}}}, {Family: evil, Error: evil}}
	s.Services = []Service{{evil, []string{evil, evil}}, {"名前", []string{evil}}, {"plain", nil}}
	s.LastDriftBy = evil
	s.Channels = []Channel{{Name: evil, Enabled: true, Error: evil,
		Budget: Budget{Unit: evil, Left: 1, Most: 1}}}
	s.History = []Transition{{Time: noon, Severity: evil, Text: evil, By: evil, Times: 3, First: noon},
		{Time: noon, Severity: "error", Text: evil}}
	s.Heartbeat, s.Started, s.Since = noon, noon, noon
	return s
}

// TestGolden is what a person sees.
func TestGolden(t *testing.T) {
	for name, s := range statuses() {
		t.Run(name, func(t *testing.T) {
			text := func(out io.Writer, style terminal.Style, width int) error {
				return s.Text(out, TextOptions{Now: noon, Style: style, Width: width})
			}
			terminaltest.Fits(t, text)
			var have bytes.Buffer
			if err := text(&have, false, 100); err != nil {
				t.Fatal(err)
			}
			file := filepath.Join("testdata", name+".txt")
			if *update {
				if err := os.WriteFile(file, have.Bytes(), 0o644); err != nil {
					t.Fatal(err)
				}
			}
			want, err := os.ReadFile(file)
			if err != nil {
				t.Fatal(err)
			}
			if diff := cmp.Diff(string(want), have.String()); diff != "" {
				t.Errorf("%s (-want +have):\n%s", file, diff)
			}
			if name == "hostile" { // its words are in no list
				return
			}
			body, err := json.Marshal(s)
			if err != nil {
				t.Fatal(err)
			}
			schema.Valid(t, "status", body)
		})
	}
}

// TestFirstLook: what docs/first-look.md shows is what is printed.
func TestFirstLook(t *testing.T) {
	page, err := os.ReadFile("../../docs/first-look.md")
	if err != nil {
		t.Fatal(err)
	}
	var text bytes.Buffer
	if err := statuses()["healthy"].Text(&text, TextOptions{Now: noon, Width: 100}); err != nil {
		t.Fatal(err)
	}
	for line := range strings.Lines(text.String()) {
		if !bytes.Contains(page, []byte("\n    "+line)) && line != "\n" {
			t.Errorf("docs/first-look.md does not show %q", line)
		}
	}
}

// TestForeignText: what others wrote is bounded and moves no terminal, in every field.
func TestForeignText(t *testing.T) {
	for name, evil := range map[string]string{
		"control": "\x1b]0;owned\x07\x1b[2J\r\nname\u009b31m\x7f", "direction": "abc\u202edcba\u2066\u200b",
		"long": strings.Repeat("\x1b[1m名", 200_000), "word": strings.Repeat("x", 1<<20), "invalid": "a\xff\xfe\xc3(",
		"empty": "", "spaces": strings.Repeat(" \u2003", 1000),
	} {
		var out bytes.Buffer
		if err := hostile(evil).Text(&out, TextOptions{Now: noon, Width: 100}); err != nil {
			t.Fatal(err)
		}
		if out.Len() > 60_000 {
			t.Errorf("%s: %d bytes", name, out.Len())
		}
		for line := range strings.Lines(out.String()) {
			line = strings.TrimSuffix(line, "\n")
			if n := terminal.Columns(line); n > 100 {
				t.Errorf("%s: a line of %d columns: %q", name, n, line)
			}
			for _, r := range line {
				if !unicode.IsPrint(r) {
					t.Fatalf("%s: %q in %q", name, r, line)
				}
			}
		}
	}
}
