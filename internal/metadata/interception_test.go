package metadata

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"net/http"
	"net/http/httptest"
	"strings"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/service-proxy-agent/service-proxy-agent/test/platform"
)

// TestWish: what a value asks for.
func TestWish(t *testing.T) {
	for value, want := range map[string]Wish{
		"off": WishOff, "OFF": WishOff, " off\n": WishOff, "Off\r\n": WishOff,
		"bypass-when-down": WishBypass, "Bypass-When-Down\n": WishBypass,
		"": "", " ": "", "on": "", "of": "", "off!": "", "false": "", "o ff": "", "offoff": "",
		"bypass": "", "bypass when down": "", "off,bypass-when-down": "", "\x00off": "",
	} {
		is, ok := Interception{Set: true, Value: value}.Wish()
		if is != want || ok != (want != "") {
			t.Errorf("%q: %q, %v; want %q", value, is, ok, want)
		}
	}
}

// overPipe has all questions of the test asked of an emulator, in memory, in time that is counted.
func overPipe(t *testing.T, e *platform.Emulator) {
	was := direct
	direct = &http.Transport{DialContext: e.Pipe(), ResponseHeaderTimeout: was.ResponseHeaderTimeout}
	t.Cleanup(func() {
		direct.CloseIdleConnections()
		direct = was
		if err := e.Close(); err != nil {
			t.Error(err)
		}
	})
	t.Setenv(HostEnv, "metadata")
}

// seenBy is what a watch was told last, and when.
type seenBy struct {
	looks []Interception
	at    []time.Time
}

func watching(t *testing.T, at Place) *seenBy {
	ctx, cancel := context.WithCancel(t.Context())
	seen, ended := &seenBy{}, make(chan struct{})
	go func() {
		defer close(ended)
		WatchInterception(ctx, at, func(i Interception) {
			seen.looks, seen.at = append(seen.looks, i), append(seen.at, time.Now())
		})
	}()
	t.Cleanup(func() { cancel(); <-ended })
	synctest.Wait()
	return seen
}

// seenWithin is the promise: what becomes of the key is seen.
const seenWithin = 5 * time.Second

// TestWatchInterception: the key that comes, changes and goes, at a moment of chance, is seen
// within five seconds at either place, whether the server answers a long poll when a key goes or
// not; and the other place does not matter.
func TestWatchInterception(t *testing.T) {
	for _, at := range []Place{OfInstance, OfProject} {
		t.Run(string(at), func(t *testing.T) {
			seed := rand.Uint64()
			t.Logf("seed %d", seed)
			r := rand.New(rand.NewPCG(seed, 0))
			synctest.Test(t, func(t *testing.T) {
				project := platform.NewProject()
				e := platform.New(platform.VM{Project: project})
				overPipe(t, e)
				seen := watching(t, at)
				if len(seen.looks) != 1 || seen.looks[0] != (Interception{}) {
					t.Fatalf("at first: %+v", seen.looks)
				}
				set, unset := e.SetAttribute, e.DeleteAttribute
				if at == OfProject {
					set, unset = project.SetAttribute, project.DeleteAttribute
				}
				slowest := time.Duration(0)
				for i := range 200 {
					time.Sleep(time.Duration(r.Int64N(int64(20 * time.Second))))
					synctest.Wait()
					was, value := len(seen.looks), fmt.Sprint("value ", i)
					if i%3 == 2 {
						value = ""
						unset(InterceptionKey)
					} else {
						set(InterceptionKey, value)
					}
					began := time.Now()
					time.Sleep(seenWithin)
					synctest.Wait()
					want := Interception{Set: value != "", Value: value}
					if len(seen.looks) != was+1 || seen.looks[was] != want {
						t.Fatalf("change %d: %+v, want %+v", i, seen.looks[was:], want)
					}
					slowest = max(slowest, seen.at[was].Sub(began))
				}
				t.Logf("the slowest of 200 took %v", slowest)
				// An idle key costs a question each two seconds.
				before := len(e.Requests())
				time.Sleep(time.Minute)
				if n := len(e.Requests()) - before; n > 31 {
					t.Errorf("%d questions a minute", n)
				}
			})
		})
	}
}

// TestWatchInterceptionGone: a server that leaves a long poll of a key hanging when that goes,
// until its time is over, is asked again in time.
func TestWatchInterceptionGone(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		project := platform.NewProject()
		project.SetAttribute(InterceptionKey, "off")
		e := platform.New(platform.VM{Project: project})
		overPipe(t, e)
		seen := watching(t, OfProject)
		time.Sleep(time.Second)
		e.Inject(platform.Fault{Prefix: "/computeMetadata/v1/project/", Delay: interceptionPace.held,
			Times: 1}) // the poll that comes next answers at its end alone
		time.Sleep(interceptionPace.held)
		synctest.Wait()
		project.DeleteAttribute(InterceptionKey)
		time.Sleep(seenWithin)
		synctest.Wait()
		if last := seen.looks[len(seen.looks)-1]; last.Set || last.Err != nil {
			t.Errorf("it is seen as %+v", last)
		}
	})
}

// TestWatchInterceptionErrors: whatever the server does instead of answering is told as an error,
// once, and never as a key that is gone. Once it is back the key is seen within five seconds of its
// next usable answer.
func TestWatchInterceptionErrors(t *testing.T) {
	for _, fault := range []platform.Fault{
		{Status: http.StatusForbidden}, {Status: http.StatusTooManyRequests},
		{Status: http.StatusInternalServerError}, {Status: http.StatusServiceUnavailable},
		{Status: http.StatusFound, Header: map[string]string{"Location": "http://elsewhere/"}},
		{Hang: true},
	} {
		t.Run(fmt.Sprintf("%d", fault.Status), func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				project := platform.NewProject()
				project.SetAttribute(InterceptionKey, "off")
				e := platform.New(platform.VM{Project: project})
				overPipe(t, e)
				seen := watching(t, OfProject)
				fault.Prefix = "/computeMetadata/v1/project/"
				end := e.Inject(fault)
				time.Sleep(5 * time.Minute)
				synctest.Wait()
				end()
				time.Sleep(interceptionPace.away + seenWithin)
				synctest.Wait()
				off, last := Interception{Set: true, Value: "off"}, len(seen.looks)-1
				if last < 2 || last > 3 || seen.looks[0] != off || seen.looks[last] != off {
					t.Fatalf("seen: %+v", seen.looks)
				}
				for _, look := range seen.looks[1:last] { // one that hung ends otherwise
					var err *Error
					if look.Set || !errors.As(look.Err, &err) || err.Code == http.StatusNotFound {
						t.Errorf("seen: %+v", look)
					}
				}
			})
		})
	}
}

// TestReadInterception: one look, and a value of somebody who means harm.
func TestReadInterception(t *testing.T) {
	project := platform.NewProject()
	project.SetAttribute(InterceptionKey, strings.Repeat("off", 1<<16))
	e := platform.New(platform.VM{Project: project})
	overPipe(t, e)
	if i := ReadInterception(t.Context(), OfInstance); i != (Interception{}) {
		t.Errorf("of the instance: %+v", i)
	}
	i := ReadInterception(t.Context(), OfProject)
	if _, ok := i.Wish(); ok || !i.Set || len(i.Value) != maxInterception || i.Err != nil {
		t.Errorf("of the project: %d bytes, %v", len(i.Value), i.Err)
	}
}

// TestFollowPacesItself: a server that says with an ETag that it can wait, and does not, is not
// asked as fast as it answers.
func TestFollowPacesItself(t *testing.T) {
	var asked atomic.Int32
	srv := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) {
		asked.Add(1)
		w.Header().Set("ETag", "same")
		_, _ = w.Write([]byte("off"))
	}))
	defer srv.Close()
	t.Setenv(HostEnv, strings.TrimPrefix(srv.URL, "http://"))
	ctx, cancel := context.WithTimeout(t.Context(), time.Second)
	defer cancel()
	WatchInterception(ctx, OfProject, func(Interception) {})
	if n := asked.Load(); n > 3 {
		t.Errorf("it was asked %d times in a second", n)
	}
}
