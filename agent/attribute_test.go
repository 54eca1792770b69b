package agent

import (
	"context"
	"errors"
	"io"
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
	"github.com/service-proxy-agent/service-proxy-agent/internal/status"
)

const keptText = `{"proxy-spec":{"proxy-port":15101}}`

// TestAttributeSource: what is in force after each look of a run, with an attribute of an earlier
// run in the state folder.
func TestAttributeSource(t *testing.T) {
	var (
		good = func(port string) metadata.Attribute {
			text := []byte(`{"proxy-spec":{"proxy-port":` + port + `}}`)
			config, err := attribute.Parse(text)
			return metadata.Attribute{Config: config, Text: text, Err: err}
		}
		malformed = good(`"x"`)
		missing   = metadata.Attribute{Err: metadata.ErrNoAttribute}
		away      = metadata.Attribute{
			Err: &metadata.Error{Path: "x", Code: http.StatusServiceUnavailable}}
	)
	const kept, own = 15101, 15102
	type look struct {
		look metadata.Attribute
		want uint16 // the port of the one in force
	}
	for _, test := range []struct {
		name  string
		looks []look
	}{
		{"missing", []look{{missing, kept}, {malformed, kept}}},
		{"malformed", []look{{malformed, kept}}},
		{"the server is away", []look{{away, kept}, {missing, kept}, {away, kept}}},
		{"a good one comes and goes", []look{{away, kept}, {good("15102"), own}, {missing, own}, {malformed, own}, {away, own}}},
	} {
		t.Run(test.name, func(t *testing.T) {
			read := time.Unix(1e9, 0)
			s := attributeSource{kept: &keptAttribute{Text: keptText, Read: read}}
			for i, l := range test.looks {
				now := time.Unix(2e9+int64(i), 0)
				news := s.next(l.look, now)
				if (news.Err != nil || news.Source != nil) != (l.look.Err != nil) ||
					(news.Source != nil) != errors.As(l.look.Err, new(*metadata.Error)) {
					t.Errorf("look %d: %v and %v of %v", i, news.Err, news.Source, l.look.Err)
				}
				switch {
				case news.Good == nil:
					t.Errorf("look %d: none in force, want port %d", i, l.want)
				case news.Good.Config.ProxyPort != l.want:
					t.Errorf("look %d: port %d in force, want %d", i, news.Good.Config.ProxyPort, l.want)
				case news.Good.Kept != (l.want == kept), news.Good.Kept != news.Good.Read.Equal(read):
					t.Errorf("look %d: in force is %+v", i, news.Good)
				}
			}
		})
	}
	if news := (&attributeSource{}).next(missing, time.Now()); news.Good != nil {
		t.Errorf("nothing kept: %+v", news)
	}
}

// TestKeptAttribute: what is kept comes back as it was, for nobody else to read; what cannot
// be used is not there.
func TestKeptAttribute(t *testing.T) {
	dir := filepath.Join(t.TempDir(), "state")
	path := filepath.Join(dir, keptFile)
	if k, err := loadKept(dir); k != nil || err != nil {
		t.Errorf("before the first: %v, %v", k, err)
	}
	want := keptAttribute{Text: keptText, Read: time.Date(2026, 11, 24, 21, 0, 0, 0, time.UTC),
		Owner: identity.Owner{Instance: "4520031799277581759", Machine: "m", Boot: "b"}}
	for range 2 {
		if err := saveKept(dir, &want); err != nil {
			t.Fatal(err)
		}
	}
	if k, err := loadKept(dir); err != nil || *k != want {
		t.Errorf("have %+v, %v, want %+v", k, err, want)
	}
	if info, err := os.Stat(path); err != nil || info.Mode() != 0o600 {
		t.Errorf("%v, %v", info.Mode(), err)
	}
	if all, err := os.ReadDir(dir); err != nil || len(all) != 1 {
		t.Errorf("beside it: %v, %v", all, err)
	}
	for name, text := range map[string]string{"half of it": `{"text":"{}`,
		"a malformed attribute": `{"text":"{\"labels\":1}"}`, "nothing": ""} {
		if err := os.WriteFile(path, []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
		if k, err := loadKept(dir); k != nil || err == nil ||
			!strings.Contains(err.Error(), "kept by an earlier run") {
			t.Errorf("%s: %v, %v", name, k, err)
		}
	}
}

// TestTakeAttribute: the loop goes by the attribute in force, whatever it hears of the newest, and
// asks for bootstrap only on behalf of one that this run has read.
func TestTakeAttribute(t *testing.T) {
	config := func(port uint16) attribute.Config {
		c := attribute.Default()
		c.ProxyPort = port
		return c
	}
	kept := &goodAttribute{Config: config(15101), Text: []byte("kept"), Kept: true}
	own := &goodAttribute{Config: config(15101), Text: []byte("kept")}
	next := &goodAttribute{Config: config(15102), Text: []byte("next")}
	bad := errors.New("bad")
	log := zap.NewNop()
	a := attributeInForce{Config: attribute.Default()}
	for _, step := range []struct {
		name  string
		news  attributeNews
		port  uint16 // 0: none in force
		stale bool   // the want is to be made anew
		text  string // that bootstrap is asked for
	}{
		{"the server is away", attributeNews{Source: bad}, 0, false, ""},
		{"a kept one", attributeNews{Good: kept, Source: bad}, 15101, true, ""},
		{"it stays", attributeNews{Good: kept, Err: bad}, 15101, false, ""},
		{"the same is read", attributeNews{Good: own}, 15101, false, "kept"},
		{"another, of which the loop hears once it is malformed", attributeNews{Good: next, Err: bad}, 15102, true, "next"},
		{"the server is away again", attributeNews{Good: next, Source: bad}, 15102, false, "next"},
	} {
		was := a.Serial
		a.take(step.news, log)
		if a.Known != (step.port != 0) || a.Known && a.Config.ProxyPort != step.port ||
			a.Serial != was != step.stale || string(a.text) != step.text {
			t.Errorf("%s: %+v, the serial was %d", step.name, a, was)
		}
		if a.Err != step.news.Err || a.Source != step.news.Source {
			t.Errorf("%s: %v, %v", step.name, a.Err, a.Source)
		}
	}
}

// TestWatchAttribute: what the loop hears, and what is kept for the next start, for each answer of
// the metadata server that a run may begin with.
func TestWatchAttribute(t *testing.T) {
	const own = "4520031799277581759"
	kept := func(of identity.VM) *keptAttribute {
		return &keptAttribute{Text: keptText, Read: time.Unix(1e9, 0).UTC(), Owner: of.Owner}
	}
	for _, test := range []struct {
		name  string
		state *keptAttribute // in the state folder
		bad   string         // instead of it
		code  int            // of the attribute
		text  string
		asks  int    // for the VM's id
		port  uint16 // of the one in force; 0: none
		keeps string // the text that is kept anew
		logs  string
	}{
		{name: "a good one", code: 200, text: `{"proxy-spec":{"proxy-port":15102}}`, asks: 1, port: 15102, keeps: `{"proxy-spec":{"proxy-port":15102}}`},
		{name: "a good one after what may be another's", state: kept(aClone), code: 200, text: `{}`, asks: 1, port: 15001, keeps: `{}`},
		{name: "missing, with nothing kept", code: 404},
		{name: "missing", state: kept(mine), code: 404, port: 15101},
		{name: "malformed", state: kept(mine), code: 200, text: `{"labels":1}`, port: 15101},
		{name: "missing, with what may be another's", state: kept(aClone), code: 404},
		{name: "the server refuses", state: kept(mine), code: 403, port: 15101},
		{name: "the server refuses, with what may be another's", state: kept(aClone), code: 403},
		{name: "what is kept cannot be read", bad: `{"text"`, code: 404, logs: "no attribute of an earlier run"},
	} {
		t.Run(test.name, func(t *testing.T) {
			dir := t.TempDir()
			if test.state != nil {
				if err := saveKept(dir, test.state); err != nil {
					t.Fatal(err)
				}
			}
			if test.bad != "" {
				if err := os.WriteFile(filepath.Join(dir, keptFile), []byte(test.bad), 0o600); err != nil {
					t.Fatal(err)
				}
			}
			asks := 0
			again := make(chan struct{}, 1) // the second look at the attribute has begun
			looks := 0
			server := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
				w.Header().Set("ETag", "e")
				// one request at a time: the watch waits for each
				if strings.HasSuffix(r.URL.Path, "/instance/id") {
					asks++
					io.WriteString(w, own)
					return
				}
				if looks++; looks > 1 && test.code == 200 {
					again <- struct{}{}
					<-r.Context().Done()
					return
				}
				w.WriteHeader(test.code)
				io.WriteString(w, test.text)
			}))
			defer server.Close()
			t.Setenv("GCE_METADATA_HOST", strings.TrimPrefix(server.URL, "http://"))
			core, logs := observer.New(zap.InfoLevel)
			a := &Agent{
				log: zap.New(core), settings: Settings{StateDir: dir}, attributes: mailbox.New[attributeNews](),
				kept: newKept(),
			}
			a.kept.whose.vm = mine
			ctx, cancel := context.WithCancel(t.Context())
			ended := make(chan struct{})
			go func() { defer close(ended); a.watchAttribute(ctx) }()
			news := <-a.attributes.Get()
			var keep *keptAttribute
			if test.keeps != "" {
				keep = <-a.kept.attribute.Get()
			}
			if test.code == 200 {
				<-again
			}
			cancel()
			<-ended
			switch {
			case news.Good == nil:
				if test.port != 0 {
					t.Errorf("none in force: %v, %v", news.Err, news.Source)
				}
			case news.Good.Config.ProxyPort != test.port || news.Good.Kept != (test.keeps == ""):
				t.Errorf("in force: port %d, kept %v", news.Good.Config.ProxyPort, news.Good.Kept)
			}
			switch {
			case test.keeps == "":
				select {
				case keep = <-a.kept.attribute.Get():
					t.Errorf("kept: %+v", keep)
				default:
				}
			case keep == nil ||
				*keep != keptAttribute{Text: test.keeps, Read: news.Good.Read,
					Owner: identity.Owner{Instance: own, Machine: mine.Machine, Boot: mine.Boot}}:
				t.Errorf("kept: %+v", keep)
			}
			if asks != test.asks {
				t.Errorf("the VM's id was asked for %d times, want %d", asks, test.asks)
			}
			all := logs.All()
			if test.logs == "" && len(all) > 0 ||
				test.logs != "" && (len(all) != 1 || !strings.Contains(all[0].Message, test.logs)) {
				t.Errorf("logged: %v", all)
			}
		})
	}
}

// TestRunHistory: what the loop and the watch leave there is in the state folder soon, and one that
// cannot be written is said once.
func TestRunHistory(t *testing.T) {
	dir := filepath.Join(t.TempDir(), "state")
	core, logs := observer.New(zap.InfoLevel)
	a := &Agent{log: zap.New(core), settings: Settings{StateDir: dir},
		kept: newKept()}
	ctx, cancel := context.WithCancel(t.Context())
	ended := make(chan struct{})
	go func() { defer close(ended); a.keepHistory(ctx) }()
	put := func(k *keptAttribute) {
		a.kept.attribute.Put(k)
		a.kept.failures.Put(Failures{Over: Failure{Text: "x", First: time.Unix(1e9, 0).UTC()}})
		a.kept.transitions.Put(keptTransitions{Transitions: []status.Transition{
			{Time: testStart, Kind: status.OfMode, Text: "x"}}})
	}
	wait := func(what string, holds func() bool) {
		t.Helper()
		for deadline := time.Now().Add(10 * time.Second); !holds(); time.Sleep(time.Millisecond) {
			if time.Now().After(deadline) {
				t.Fatal(what)
			}
		}
	}
	put(&keptAttribute{Text: keptText})
	wait("nothing is kept", func() bool {
		k, err := loadKept(dir)
		past, _ := loadTransitions(dir, identity.VM{})
		return err == nil && k != nil && k.Text == keptText && len(past) == 1 &&
			loadFailures(dir, identity.VM{}).Over.Text == "x"
	})
	if logs.Len() != 0 {
		t.Errorf("logged: %v", logs.All())
	}
	cancel()
	<-ended

	file := filepath.Join(t.TempDir(), "file")
	if err := os.WriteFile(file, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	if err := saveKept(filepath.Join(file, "state"), &keptAttribute{Text: keptText}); err == nil {
		t.Error("no error of a folder that cannot be made")
	}
	a.settings.StateDir = filepath.Join(file, "state")
	ctx, cancel = context.WithCancel(t.Context())
	ended = make(chan struct{})
	go func() { defer close(ended); a.keepHistory(ctx) }()
	taken := func() bool { return len(a.kept.attribute.Get()) == 0 && len(a.kept.failures.Get()) == 0 }
	for range 3 {
		put(&keptAttribute{Text: keptText})
		wait("it is not taken", taken)
	}
	wait("nothing is said", func() bool { return logs.Len() >= 3 })
	cancel()
	<-ended
	if logs.Len() != 3 || logs.FilterMessage("the attribute is not kept").Len() != 1 ||
		logs.FilterMessage("history is not kept").Len() != 1 ||
		logs.FilterMessage("transitions are not kept").Len() != 1 {
		t.Errorf("logged: %v", logs.All())
	}
}
