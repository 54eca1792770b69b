package agent

import (
	"context"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"go.uber.org/zap"
	"go.uber.org/zap/zaptest/observer"

	"github.com/service-proxy-agent/service-proxy-agent/internal/attribute"
	"github.com/service-proxy-agent/service-proxy-agent/internal/identity"
	"github.com/service-proxy-agent/service-proxy-agent/internal/mailbox"
	"github.com/service-proxy-agent/service-proxy-agent/internal/metadata"
	"github.com/service-proxy-agent/service-proxy-agent/internal/reconcile"
	"github.com/service-proxy-agent/service-proxy-agent/internal/status"
	"github.com/service-proxy-agent/service-proxy-agent/test/platform"
)

// says is what the key says at a place.
func says(value string) metadata.Interception {
	return metadata.Interception{Set: true, Value: value}
}

var (
	noKey   = metadata.Interception{}
	failing = metadata.Interception{Err: &metadata.Error{Code: http.StatusServiceUnavailable}}
)

// TestBrake: what the key asks for, by all that both places said one after the other.
func TestBrake(t *testing.T) {
	const instance, project = metadata.OfInstance, metadata.OfProject
	type look struct {
		at   metadata.Place
		look metadata.Interception
	}
	for _, test := range []struct {
		name  string
		looks []look
		late  bool
		want  brake // but for Since
	}{
		{"nobody has told", nil, false, brake{Awaited: true}},
		{"nobody has told for long", nil, true, brake{}},
		{"one place has", []look{{instance, noKey}}, false, brake{Awaited: true}},
		{"the other has", []look{{project, noKey}}, false, brake{Awaited: true}},
		{"one place has, and the other is late", []look{{project, noKey}}, true, brake{}},
		{"no key", []look{{project, noKey}, {instance, noKey}}, false, brake{}},
		{"off by the project", []look{{project, says("off")}, {instance, noKey}}, false,
			brake{Off: true, By: project}},
		{"off at once", []look{{project, says("off")}}, false,
			brake{Off: true, By: project, Awaited: true}},
		{"off by the instance", []look{{project, noKey}, {instance, says("off")}}, false,
			brake{Off: true, By: instance}},
		{"off by both", []look{{project, says("off")}, {instance, says("OFF\n")}}, false,
			brake{Off: true, By: instance}},
		{"the instance lets itself out", []look{{project, says("off")}, {instance, says("bypass-when-down")}},
			false, brake{Bypass: true, By: instance}},
		{"bypass", []look{{project, says("bypass-when-down")}, {instance, noKey}}, false,
			brake{Bypass: true, By: project}},
		{"the instance is off in a fleet with bypass", []look{{project, says("bypass-when-down")},
			{instance, says("off")}}, false, brake{Off: true, By: instance}},
		{"it goes", []look{{project, says("off")}, {instance, noKey}, {project, noKey}}, false, brake{}},
		{"the instance's goes, and the project's is there",
			[]look{{project, says("off")}, {instance, says("bypass-when-down")}, {instance, noKey}}, false,
			brake{Off: true, By: project}},
		{"the server is away", []look{{project, says("off")}, {instance, noKey}, {project, failing},
			{instance, failing}}, false, brake{Off: true, By: project}},
		{"the server was never there", []look{{project, failing}, {instance, failing}}, false,
			brake{Awaited: true}},
		{"nobody understands it", []look{{project, says("aus")}, {instance, noKey}}, false,
			brake{Bad: "aus", BadBy: project}},
		{"empty", []look{{project, says(" \n")}, {instance, noKey}}, false,
			brake{Bad: "(empty)", BadBy: project}},
		{"a slip of the pen does not end it", []look{{project, says("off")}, {instance, noKey},
			{project, says("of")}}, false, brake{Off: true, By: project, Bad: "of", BadBy: project}},
		{"nor does it begin one", []look{{project, says("on")}, {instance, noKey}}, false,
			brake{Bad: "on", BadBy: project}},
		{"corrected", []look{{project, says("of")}, {instance, noKey}, {project, says("off")}}, false,
			brake{Off: true, By: project}},
		{"taken away", []look{{project, says("of")}, {instance, noKey}, {project, noKey}}, false, brake{}},
		{"the instance's is not understood, and the project's holds",
			[]look{{project, says("off")}, {instance, says("on")}}, false,
			brake{Off: true, By: project, Bad: "on", BadBy: instance}},
		{"harm", []look{{project, says("\x1b[2J" + strings.Repeat("x", 300))}, {instance, noKey}}, false,
			brake{Bad: "?", BadBy: project}},
	} {
		var k keptBrake
		for _, l := range test.looks {
			k = k.take(l.at, l.look, testStart)
		}
		is := k.brake(test.late)
		if test.want.Bad == "?" {
			if len(is.Bad) > maxBadKey+8 || strings.Contains(is.Bad, "\x1b") || is.Bad == "" {
				t.Errorf("%s: told as %q", test.name, is.Bad)
			}
			test.want.Bad = is.Bad
		}
		if test.want.Off {
			test.want.Since = testStart
		}
		if is != test.want {
			t.Errorf("%s: %+v, want %+v", test.name, is, test.want)
		}
	}
}

// TestBrakeSince: it is off since it was first seen off, whoever says so meanwhile; one that ends
// begins anew.
func TestBrakeSince(t *testing.T) {
	var k keptBrake
	now := testStart.Add(300 * time.Millisecond)
	at := func(s int) time.Time { return testStart.Add(time.Duration(s) * time.Second) }
	for i, step := range []struct {
		at   metadata.Place
		look metadata.Interception
		want time.Time
	}{
		{metadata.OfInstance, noKey, time.Time{}},
		{metadata.OfProject, says("off"), at(1)},
		{metadata.OfProject, failing, at(1)},
		{metadata.OfProject, says("x"), at(1)},
		{metadata.OfInstance, says("off"), at(1)},
		{metadata.OfProject, noKey, at(1)},
		{metadata.OfInstance, says("bypass-when-down"), time.Time{}},
		{metadata.OfProject, says("off"), time.Time{}},
		{metadata.OfInstance, noKey, at(8)},
	} {
		k = k.take(step.at, step.look, now)
		now = now.Add(time.Second)
		if is := k.brake(true); !is.Since.Equal(step.want) || !k.Since.Equal(step.want) {
			t.Errorf("step %d: %v, want %v", i, is.Since, step.want)
		}
	}
}

// TestBrakePolicy: the key wins over the setting, and does not turn bypass off.
func TestBrakePolicy(t *testing.T) {
	for _, test := range []struct {
		set    reconcile.WhenEnvoyDown
		bypass bool
		want   reconcile.WhenEnvoyDown
		by     string
	}{
		{reconcile.Keep, false, reconcile.Keep, "setting"},
		{reconcile.Keep, true, reconcile.Bypass, "project"},
		{reconcile.Bypass, false, reconcile.Bypass, "setting"},
		{reconcile.Bypass, true, reconcile.Bypass, "project"},
	} {
		b, s := brake{Bypass: test.bypass}, Settings{WhenEnvoyDown: test.set}
		if test.bypass {
			b.By = metadata.OfProject
		}
		want := status.Interception{State: "on", WhenEnvoyDown: string(test.want),
			WhenEnvoyDownBy: test.by}
		if is := b.whenDown(s); is != test.want || b.status(s) != want {
			t.Errorf("%+v: %s, %+v", test, is, b.status(s))
		}
	}
}

// TestKeptBrake: what is kept comes back on this machine alone, whatever stands in the file.
func TestKeptBrake(t *testing.T) {
	dir := filepath.Join(t.TempDir(), "state")
	path := filepath.Join(dir, brakeFile)
	m := identity.VM{Owner: identity.Owner{Machine: "m"}, Tagged: true}
	if k, err := loadBrake(dir, m); err != nil || !k.same(keptBrake{}) {
		t.Errorf("before the first: %+v, %v", k, err)
	}
	k := keptBrake{Owner: identity.Owner{Instance: "1", Machine: "m"}}.
		take(metadata.OfProject, says("off"), testStart).
		take(metadata.OfInstance, says("aus"), testStart)
	for range 2 {
		if err := k.save(dir); err != nil {
			t.Fatal(err)
		}
	}
	back, err := loadBrake(dir, m)
	want := brake{Off: true, Since: testStart, By: metadata.OfProject, Bad: "aus",
		BadBy: metadata.OfInstance, Awaited: true}
	if err != nil || !back.same(k) || back.brake(false) != want {
		t.Errorf("%+v, %v", back, err)
	}
	if info, err := os.Stat(path); err != nil || info.Mode() != 0o600 {
		t.Errorf("%v, %v", info.Mode(), err)
	}
	for _, vm := range []identity.Owner{{Machine: "other"}, {}, {Machine: "m", Instance: "2"}} {
		if k, err := loadBrake(dir, identity.VM{Owner: vm, Tagged: true}); err != nil ||
			!k.same(keptBrake{}) {
			t.Errorf("on %+v: %+v, %v", vm, k, err)
		}
	}
	for name, test := range map[string]struct {
		text string
		ok   bool
	}{
		"half of it":        {`{"keys":{"project"`, false},
		"nothing":           {``, false},
		"a newer version's": {`{"keys":{"project":{"wish":"slow"},"folder":{"wish":"off"}},"machine":"m"}`, true},
		"harm": {`{"keys":{"project":{"bad":"` + strings.Repeat(`\u001b`, 4000) +
			`"}},"since":"9999-12-31T23:59:59-01:00","machine":"m"}`, true},
	} {
		if err := os.WriteFile(path, []byte(test.text), 0o600); err != nil {
			t.Fatal(err)
		}
		k, err := loadBrake(dir, m)
		if is := k.brake(true); (err == nil) != test.ok || is.Off || is.Bypass ||
			len(is.Bad) > 2*maxBadKey || strings.Contains(is.Bad, "\x1b") {
			t.Errorf("%s: %+v, %v", name, is, err)
		}
		if err := k.save(dir); err != nil {
			t.Errorf("%s: %v", name, err)
		}
	}
}

// TestWatchBrake: what the loop hears, and what is kept for the next start, for each answer of the
// metadata server that a run may begin with.
func TestWatchBrake(t *testing.T) {
	here := identity.Here("")
	other := identity.Owner{Instance: "1", Machine: "other", Boot: "other"}
	off := func(of identity.Owner) *keptBrake {
		k := keptBrake{Owner: of}.
			take(metadata.OfProject, says("off"), testStart)
		return &k
	}
	for _, test := range []struct {
		name              string
		kept              *keptBrake
		config            bool
		instance, project string // what is there; "": 404, "!": 403
		want              brake  // at last; Since: testStart is the kept one, zero none, else now
		fresh             bool   // off since now
		saved             bool
	}{
		{name: "no key", saved: true},
		{name: "off", project: "off", want: brake{Off: true, By: metadata.OfProject}, fresh: true, saved: true},
		{name: "off again", kept: off(here.Owner), project: "off",
			want: brake{Off: true, By: metadata.OfProject, Since: testStart}},
		{name: "it has gone", kept: off(here.Owner), saved: true},
		{name: "the server is away", kept: off(here.Owner), instance: "!", project: "!",
			want: brake{Off: true, By: metadata.OfProject, Since: testStart, Awaited: true}},
		{name: "away, with --config", kept: off(here.Owner), instance: "!", project: "!", config: true,
			want: brake{Off: true, By: metadata.OfProject, Since: testStart}},
		{name: "away for the project's", kept: off(here.Owner), project: "!",
			want: brake{Off: true, By: metadata.OfProject, Since: testStart, Awaited: true}},
		{name: "the instance's wins", kept: off(here.Owner), instance: "bypass-when-down", project: "!",
			want: brake{Bypass: true, By: metadata.OfInstance, Awaited: true}, saved: true},
		{name: "on a clone", kept: off(other), instance: "", project: "!", want: brake{Awaited: true},
			saved: true},
		{name: "on a clone whose project has it on", kept: off(other), project: "off",
			want: brake{Off: true, By: metadata.OfProject}, fresh: true, saved: true},
	} {
		t.Run(test.name, func(t *testing.T) {
			dir := t.TempDir()
			if test.kept != nil {
				if err := test.kept.save(dir); err != nil {
					t.Fatal(err)
				}
			}
			project := platform.NewProject()
			e := platform.New(platform.VM{Project: project})
			for place, value := range map[string]string{"instance": test.instance, "project": test.project} {
				switch prefix := "/computeMetadata/v1/" + place + "/attributes/"; {
				case value == "!":
					e.Inject(platform.Fault{Prefix: prefix, Status: http.StatusForbidden})
				case value == "":
				case place == "project":
					project.SetAttribute(metadata.InterceptionKey, value)
				default:
					e.SetAttribute(metadata.InterceptionKey, value)
				}
			}
			server := httptest.NewServer(e)
			defer server.Close()
			t.Setenv("GCE_METADATA_HOST", strings.TrimPrefix(server.URL, "http://"))
			core, logs := observer.New(zap.InfoLevel)
			a := &Agent{log: zap.New(core), settings: Settings{StateDir: dir}, kept: newKept(),
				brakes: mailbox.New[brake]()}
			a.kept.whose.vm = here
			if test.config {
				a.config = new(attribute.Default())
			}
			began := time.Now().Add(-time.Second)
			ctx, cancel := context.WithCancel(t.Context())
			ended := make(chan struct{})
			go func() { defer close(ended); _ = a.watchBrake(ctx) }()
			kept, err := loadBrake(dir, here) // what the loop begins with
			if err != nil {
				t.Fatal(err)
			}
			is, saved := kept.brake(test.config), false
			asWanted := func() bool {
				b := is
				if test.fresh && b.Since.After(began) {
					b.Since = time.Time{}
				}
				return b == test.want
			}
			asked := func() bool { // twice each, as far as there is more than one answer to come
				seen := map[string]bool{}
				for _, r := range e.Requests() {
					seen[r.Path] = true
				}
				return len(seen) >= 2
			}
			for deadline := time.Now().Add(10 * time.Second); ; {
				select {
				case is = <-a.brakes.Get():
				case kept = <-a.kept.brake.Get():
					saved = true
				case <-time.After(50 * time.Millisecond):
				}
				if asked() && asWanted() && saved == test.saved &&
					(!saved || kept.brake(true).By == test.want.By) {
					break
				}
				if time.Now().After(deadline) {
					t.Fatalf("%+v, kept %+v, logged %v; want %+v", is, kept, logs.All(), test.want)
				}
			}
			cancel()
			<-ended
			select {
			case is = <-a.brakes.Get():
				if !asWanted() {
					t.Errorf("and then %+v", is)
				}
			default:
			}
			if all := logs.All(); len(all) > 0 {
				t.Errorf("logged: %v", all)
			}
		})
	}
}

// TestBrakeTold: a brake that comes, changes hands and goes is told once each, with since when and
// by whose metadata, and so is a policy of the fleet's.
func TestBrakeTold(t *testing.T) {
	told, take := heard()
	off := brake{Off: true, Since: testStart, By: metadata.OfProject}
	byInstance := off
	byInstance.By = metadata.OfInstance
	for _, step := range []struct {
		name  string
		brake brake
		jumps bool
		want  string
	}{
		{"intercepting", brake{}, true, "INFO interception: intercepting"},
		{"it comes, and is not written yet", off, true, "WARNING not ready: jumps"},
		{"it is", off, false, "INFO interception: off, by the project's metadata " +
			"(service-proxy-agent-interception) since 2026-11-28T18:00:00Z\n" +
			"INFO ready: interception is off, and connections go past Envoy"},
		{"it stands", off, false, ""},
		{"the instance has it, too", byInstance, false, "INFO interception: off, by this VM's metadata " +
			"(service-proxy-agent-interception) since 2026-11-28T18:00:00Z"},
		{"it goes, and bypass comes", brake{Bypass: true, By: metadata.OfProject}, true,
			"INFO interception: intercepting\n" +
				"INFO when Envoy is down: bypass, by the project's metadata (service-proxy-agent-interception)"},
		{"all goes", brake{}, true, "INFO when Envoy is down: keep, as it is set on the VM"},
	} {
		p := intercepting()
		p.seen.Brake = step.brake
		for i := range p.outcomes {
			p.outcomes[i].Status.Jumps = step.jumps
			if step.brake.Off && step.jumps {
				p.outcomes[i].NotReady = "jumps"
			}
		}
		told.publish(p, "nft")
		var lines []string
		for line := range strings.Lines(take()) {
			for _, word := range []string{"interception", "when Envoy is down", "not ready"} {
				if strings.Contains(line, word) {
					lines = append(lines, strings.TrimSpace(line))
					break
				}
			}
		}
		if got := strings.Join(lines, "\n"); got != step.want {
			t.Errorf("%s: told\n%s\nwant\n%s", step.name, got, step.want)
		}
	}
	var modes []string
	for _, line := range told.past.lines {
		if line.Kind == status.OfMode {
			modes = append(modes, line.Text)
		}
	}
	if len(modes) != 6 || !strings.Contains(modes[1], "by the project's metadata") {
		t.Errorf("remembered: %q", modes)
	}
}
