package bootstrap

import (
	"bytes"
	"context"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"net"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"go.uber.org/zap"
	"go.uber.org/zap/zaptest/observer"

	"github.com/service-proxy-agent/service-proxy-agent/internal/untrusted"
	"github.com/service-proxy-agent/service-proxy-agent/test/platform"
)

// fetched downloads the source, and returns what was written.
func fetched(t *testing.T, b *bootstrapper, source string) (string, error) {
	t.Helper()
	into, err := os.Create(filepath.Join(t.TempDir(), "into"))
	if err != nil {
		t.Fatal(err)
	}
	defer into.Close()
	if err := b.download(t.Context(), source, into); err != nil {
		return "", err
	}
	text, err := io.ReadAll(into) // from where the download has left it
	if err != nil {
		t.Fatal(err)
	}
	return string(text), nil
}

// wantFailure checks a download's whole error, behind "download SOURCE: ".
func wantFailure(t *testing.T, source string, err error, text string, permanent bool) {
	t.Helper()
	want := "download " + redact(source) + ": " + text
	var failed *downloadError
	if !errors.As(err, &failed) || err.Error() != want || failed.permanent != permanent {
		t.Errorf("have %v (permanent: %v)\nwant %s (%v)", err, failed != nil && failed.permanent,
			want, permanent)
	}
}

// answers is an https server with one answer a path.
func answers(t *testing.T, paths map[string]http.HandlerFunc) *httptest.Server {
	t.Helper()
	mux := http.NewServeMux()
	for path, answer := range paths {
		mux.HandleFunc(path, answer)
	}
	srv := httptest.NewUnstartedServer(mux)
	srv.EnableHTTP2 = true
	srv.StartTLS()
	t.Cleanup(srv.Close)
	return srv
}

func says(text string) http.HandlerFunc {
	return func(w http.ResponseWriter, _ *http.Request) { _, _ = io.WriteString(w, text) }
}

// sumOf is a text's SHA-256 as sha256sum prints it.
func sumOf(text string) string {
	sum := sha256.Sum256([]byte(text))
	return hex.EncodeToString(sum[:])
}

// gs:// is read with the token of the VM's service account.
func TestDownloadCloudStorage(t *testing.T) {
	quickRetries(t)
	const archive = "the archive"
	for _, tt := range []struct {
		name      string
		vm        platform.VM
		fault     *platform.Fault
		source    string
		fails     string
		permanent bool
	}{
		{name: "private", source: "gs://private/dir/x.tgz"},
		{name: "public", source: "gs://public/x.tgz"},
		{name: "with its checksum beside it", source: "gs://private/beside.tgz"},
		{name: "a right that is missing", source: "gs://denied/x.tgz", permanent: true,
			fails: "status 403 Forbidden: " +
				"grant the VM's service account roles/storage.objectViewer on the bucket"},
		{name: "not there", source: "gs://private/none.tgz", permanent: true,
			fails: "status 404 Not Found"},
		{name: "no service account", vm: platform.VM{ServiceAccount: "none"}, permanent: true,
			source: "gs://private/dir/x.tgz",
			fails:  "read its .sha256: the VM has no service account to read Cloud Storage with"},
		{name: "a token that is none", source: "gs://private/dir/x.tgz",
			fault: &platform.Fault{Prefix: "/computeMetadata/", Status: 200, Body: "<html>"},
			fails: "read its .sha256: the metadata server's token cannot be read"},
		{name: "an empty token", source: "gs://private/dir/x.tgz",
			fault: &platform.Fault{Prefix: "/computeMetadata/", Status: 200, Body: `{"access_token": ""}`},
			fails: "read its .sha256: the metadata server's token cannot be read"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			cloud := platform.New(tt.vm)
			cloud.PutObject("private", "dir/x.tgz", []byte(archive))
			cloud.PutObject("private", "beside.tgz", []byte(archive))
			cloud.PutObject("private", "beside.tgz.sha256", []byte(sumOf(archive)+"  beside.tgz\n"))
			cloud.PutObject("public", "x.tgz", []byte(archive))
			cloud.PutObject("denied", "x.tgz", []byte(archive))
			cloud.MakePublic("public")
			cloud.Deny("denied")
			metadata := httptest.NewServer(cloud)
			t.Cleanup(metadata.Close)
			t.Setenv("GCE_METADATA_HOST", strings.TrimPrefix(metadata.URL, "http://"))
			storage := httptest.NewTLSServer(cloud)
			t.Cleanup(storage.Close)
			if tt.fault != nil {
				defer cloud.Inject(*tt.fault)()
			}
			b := newBootstrapper(Options{Root: tlsRoot(t, storage),
				storage: strings.TrimPrefix(storage.URL, "https://")})
			have, err := fetched(t, b, tt.source)
			if tt.fails != "" {
				wantFailure(t, tt.source, err, tt.fails, tt.permanent)
			} else if err != nil || have != archive {
				t.Errorf("have %q, %v", have, err)
			}
		})
	}
	if b := newBootstrapper(Options{}); b.storage != "storage.googleapis.com" {
		t.Errorf("objects are asked of %s", b.storage)
	}
}

// A metadata server that does not answer may come back.
func TestDownloadWithoutToken(t *testing.T) {
	quickRetries(t)
	synctest.Test(t, func(t *testing.T) { // its own retries take seconds
		t.Setenv("GCE_METADATA_HOST", "127.0.0.1:1")
		_, err := fetched(t, newBootstrapper(Options{Root: t.TempDir()}), "gs://private/x.tgz")
		var failed *downloadError
		if !errors.As(err, &failed) || failed.permanent || !strings.Contains(err.Error(), "refused") {
			t.Errorf("have %v", err)
		}
	})
}

// A checksum is 64 hex digits, behind the URL or as the first word of the file beside it.
func TestDownloadChecksums(t *testing.T) {
	quickRetries(t)
	const archive = "the archive"
	sum := sumOf(archive)
	zeros := strings.Repeat("0", 64)
	const behind = "want #sha256= and 64 hex digits behind the URL"
	const beside = "its .sha256 does not start with 64 hex digits"
	another := "wrong checksum: sha256 " + sum + ", want " + zeros
	for _, tt := range []struct {
		name, fragment, file string
		fails                string
	}{
		{"none", "", "", ""},
		{"behind", "#sha256=" + sum, zeros, ""}, // and the file is not asked for
		{"behind, without its name", "#" + sum, "", behind},
		{"behind, of another name", "#sha512=" + sum, "", behind},
		{"behind, short", "#sha256=" + sum[:62], "", behind},
		{"behind, long", "#sha256=" + sum + "00", "", behind},
		{"behind, no hex", "#sha256=" + strings.Repeat("g", 64), "", behind},
		{"behind, another's", "#sha256=" + zeros, "", another},
		{"beside", "", sum, ""},
		{"beside, with a name", "", "\n" + strings.ToUpper(sum) + "  x.tgz\nmore", ""},
		{"beside, short", "", sum[:62] + "  x.tgz", beside},
		{"beside, long", "", sum + "00", beside},
		{"beside, no hex", "", strings.Repeat("g", 64), beside},
		{"beside, another's", "", zeros, another},
		{"beside, and a long text", "", sum + " " + strings.Repeat("x", 4096-65), ""},
		{"beside, behind more than is read", "", strings.Repeat("\n", 4096) + sum, beside},
	} {
		t.Run(tt.name, func(t *testing.T) {
			asked := false
			srv := answers(t, map[string]http.HandlerFunc{
				"/x.tgz": says(archive),
				"/x.tgz.sha256": func(w http.ResponseWriter, r *http.Request) {
					asked = true
					if tt.file == "" {
						http.NotFound(w, r)
						return
					}
					says(tt.file)(w, r)
				},
			})
			source := srv.URL + "/x.tgz" + tt.fragment
			have, err := fetched(t, newBootstrapper(Options{Root: tlsRoot(t, srv)}), source)
			if tt.fails != "" {
				wantFailure(t, source, err, tt.fails, true)
			} else if err != nil || have != archive {
				t.Errorf("have %q, %v", have, err)
			}
			if asked != (tt.fragment == "") {
				t.Errorf("the file beside it was asked for: %v", asked)
			}
		})
	}
}

// The file beside an archive is asked for with the URL's query, which may sign it; an answer that
// breaks off may pass.
func TestDownloadAsksBeside(t *testing.T) {
	quickRetries(t)
	var asked []string
	srv := httptest.NewTLSServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		asked = append(asked, r.RequestURI)
		switch {
		case strings.HasPrefix(r.URL.Path, "/half") && strings.HasSuffix(r.URL.Path, ".sha256"):
			w.Header().Set("Content-Length", "1000")
			says("half")(w, r)
		case strings.HasSuffix(r.URL.Path, ".sha256"):
			http.NotFound(w, r)
		default:
			says("the archive")(w, r)
		}
	}))
	defer srv.Close()
	b := newBootstrapper(Options{Root: tlsRoot(t, srv)})
	if have, err := fetched(t, b, srv.URL+"/a.tgz?sig=x"); err != nil || have != "the archive" {
		t.Errorf("have %q, %v", have, err)
	}
	if want := []string{"/a.tgz.sha256?sig=x", "/a.tgz?sig=x"}; !slices.Equal(asked, want) {
		t.Errorf("asked for %q, want %q", asked, want)
	}
	source := srv.URL + "/half.tgz"
	_, err := fetched(t, b, source)
	wantFailure(t, source, err, "read its .sha256: unexpected EOF", false)
}

// An archive is read up to a limit, and whole.
func TestReceive(t *testing.T) {
	const mb = 1 << 20
	text := strings.Repeat("x", mb)
	var into bytes.Buffer
	if have, err := receive(&into, strings.NewReader(text), mb); err != nil || have != sumOf(text) ||
		into.String() != text {
		t.Errorf("have %s, %v, %d bytes", have, err, into.Len())
	}
	_, err := receive(io.Discard, strings.NewReader(text+"x"), mb)
	if !errors.Is(err, errLarge) || !isPermanent(err) || err.Error() != "larger than 1 MB" {
		t.Errorf("have %v", err)
	}
	disk := &fs.PathError{Op: "write", Path: "x", Err: errors.New("no space")}
	if _, err := receive(failingWriter{disk}, strings.NewReader(text), mb); !errors.Is(err, disk) {
		t.Errorf("have %v", err)
	}
	if have := maxArchive >> 20; have != 512 {
		t.Errorf("an archive may have %d MB", have)
	}
}

// Which errors of a download somebody must mend.
func TestIsPermanent(t *testing.T) {
	status := func(code int) error { return fmt.Errorf("x: %w", &statusError{code: code}) }
	for _, tt := range []struct {
		err    error
		want   bool
		absent bool // nothing is there
	}{
		{status(302), false, false},
		{status(400), true, false},
		{status(401), true, false},
		{status(403), true, true},
		{status(404), true, true},
		{status(408), false, false},
		{status(410), true, false},
		{status(429), false, false},
		{status(499), true, false},
		{status(500), false, false},
		{status(503), false, false},
		{&fs.PathError{Op: "open", Path: "x", Err: fs.ErrNotExist}, true, true},
		{untrusted.ErrNotRegular, true, false},
		{errURL, true, false},
		{errSumWanted, true, false},
		{errSumFile, true, false},
		{errChecksum, true, false},
		{errScheme, true, false},
		{errRedirect, true, false},
		{errNoAccount, true, false},
		{io.ErrUnexpectedEOF, false, false},
		{context.DeadlineExceeded, false, false},
	} {
		if have := isPermanent(tt.err); have != tt.want {
			t.Errorf("%v: have %v", tt.err, have)
		}
		if have := isAbsent(tt.err); have != tt.absent {
			t.Errorf("%v: absent: %v", tt.err, have)
		}
	}
}

// The pauses before what is tried again, told in the log: 1, 2 and 4 s, and up to a quarter more.
func TestDownloadPauses(t *testing.T) {
	for range 20 { // the quarter is drawn
		synctest.Test(t, func(t *testing.T) {
			core, logs := observer.New(zap.InfoLevel)
			b := newBootstrapper(Options{Root: t.TempDir(), Log: zap.New(core)})
			began := time.Now()
			_, err := fetched(t, b, "https://127.0.0.1:1/x.tgz")
			took := time.Since(began)
			if err == nil || took < 7*time.Second || took > 8750*time.Millisecond {
				t.Errorf("%v after %v", err, took)
			}
			var pauses []any
			for _, e := range logs.FilterMessage("a download is tried again").All() {
				pauses = append(pauses, e.ContextMap()["pause"])
			}
			if want := []any{time.Second, 2 * time.Second, 4 * time.Second}; !slices.Equal(pauses, want) {
				t.Errorf("paused %v", pauses)
			}
		})
	}
}

// A download that is told to end pauses no more.
func TestDownloadEnds(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		into, err := os.Create(filepath.Join(t.TempDir(), "into"))
		if err != nil {
			t.Fatal(err)
		}
		defer into.Close()
		ctx, cancel := context.WithTimeout(t.Context(), time.Second/2)
		defer cancel()
		began := time.Now()
		b := newBootstrapper(Options{Root: t.TempDir()})
		err = b.download(ctx, "https://127.0.0.1:1/x.tgz", into)
		if took := time.Since(began); took != time.Second/2 || !strings.Contains(err.Error(), "refused") {
			t.Errorf("%v after %v", err, took)
		}
	})
}

// What a broken try has written is gone when the next begins.
func TestDownloadBeginsAnew(t *testing.T) {
	quickRetries(t)
	var tries atomic.Int32
	srv := answers(t, map[string]http.HandlerFunc{
		"/x.tgz.sha256": http.NotFound,
		"/x.tgz": func(w http.ResponseWriter, r *http.Request) {
			if tries.Add(1) < 3 {
				w.Header().Set("Content-Length", "1000")
				says(strings.Repeat("x", 500))(w, r)
				panic(http.ErrAbortHandler)
			}
			says("the archive")(w, r)
		},
	})
	b := newBootstrapper(Options{Root: tlsRoot(t, srv)})
	if have, err := fetched(t, b, srv.URL+"/x.tgz"); err != nil || have != "the archive" {
		t.Errorf("have %q, %v", have, err)
	}
}

// A disk that cannot be written is not asked again: it is not the source's failure.
func TestDownloadToBrokenDisk(t *testing.T) {
	quickRetries(t)
	var asked atomic.Int32
	srv := answers(t, map[string]http.HandlerFunc{
		"/x.tgz.sha256": http.NotFound,
		"/x.tgz": func(w http.ResponseWriter, r *http.Request) {
			asked.Add(1)
			says("the archive")(w, r)
		},
	})
	name := filepath.Join(t.TempDir(), "into")
	write(t, name, "")
	into, err := os.Open(name) // to read: it cannot be written
	if err != nil {
		t.Fatal(err)
	}
	defer into.Close()
	b := newBootstrapper(Options{Root: tlsRoot(t, srv)})
	err = b.download(t.Context(), srv.URL+"/x.tgz", into)
	var disk *fs.PathError
	if !errors.As(err, &disk) || disk.Op != "write" || asked.Load() != 1 {
		t.Errorf("have %v after %d requests", err, asked.Load())
	}
}

// Up to five redirects are followed, with https alone, and what is asked for is what was stored.
func TestDownloadRequests(t *testing.T) {
	quickRetries(t)
	var odd []string
	hop := func(to string) http.HandlerFunc {
		return func(w http.ResponseWriter, r *http.Request) {
			if r.ProtoMajor != 2 || r.Header.Get("Accept-Encoding") != "" ||
				r.Header.Get("Authorization") != "" || r.Method != http.MethodGet {
				odd = append(odd, fmt.Sprint(r.Proto, r.Method, r.Header))
			}
			if to == "" {
				says("the archive")(w, r)
				return
			}
			http.Redirect(w, r, to, http.StatusFound)
		}
	}
	srv := answers(t, map[string]http.HandlerFunc{
		"/6": hop("/5"), "/5": hop("/4"), "/4": hop("/3"), "/3": hop("/2"), "/2": hop("/1"),
		"/1": hop("/0"), "/0": hop(""),
	})
	b := newBootstrapper(Options{Root: tlsRoot(t, srv)})
	if have, err := fetched(t, b, srv.URL+"/5"); err != nil || have != "the archive" {
		t.Errorf("five redirects: %q, %v", have, err)
	}
	_, err := fetched(t, b, srv.URL+"/6")
	wantFailure(t, srv.URL+"/6", err, "redirected away from https, or more than 5 times", true)
	if len(odd) > 0 {
		t.Errorf("asked with %q", odd)
	}
}

// What a status says to a person: nothing, or what to do.
func TestStatusErrors(t *testing.T) {
	const public = ": it is not public, or not there; " +
		"a private object of Cloud Storage is gs://BUCKET/OBJECT"
	const grant = ": grant the VM's service account roles/storage.objectViewer on the bucket"
	for _, tt := range []struct {
		code                     int
		anonymously, withAccount string
	}{
		{401, public, grant},
		{403, public, grant},
		{404, "", ""},
		{500, "", ""},
	} {
		for with, want := range map[bool]string{false: tt.anonymously, true: tt.withAccount} {
			if have := statusHint(tt.code, with); have != want {
				t.Errorf("%d, with a token: %v: %q, want %q", tt.code, with, have, want)
			}
		}
	}
	if have := (&statusError{503, ": x"}).Error(); have != "status 503 Service Unavailable: x" {
		t.Errorf("have %q", have)
	}
}

// An error never shows the URL with what is secret in it.
func TestDownloadErrorsAreRedacted(t *testing.T) {
	quickRetries(t)
	b := newBootstrapper(Options{Root: t.TempDir()})
	for source, want := range map[string]string{
		"https://user:SECRET@127.0.0.1:1/x?sig=SECRET": "download https://127.0.0.1:1/x: " +
			"read its .sha256: dial tcp 127.0.0.1:1: connect: connection refused",
		"https://h/%zz?SECRET": "download (malformed URL): malformed URL",
		"ftp://h/x?SECRET": "download ftp://h/x: " +
			`read its .sha256: scheme "ftp" is none of gs, https, file`,
	} {
		if _, err := fetched(t, b, source); err == nil || err.Error() != want {
			t.Errorf("have %v\nwant %s", err, want)
		}
	}
}

// A server that takes the request and says nothing is given up.
func TestDownloadWithoutAnswer(t *testing.T) {
	quickRetries(t)
	defer func(limit time.Duration) { stallLimit = limit }(stallLimit)
	if stallLimit != 30*time.Second {
		t.Errorf("a stall is %v", stallLimit)
	}
	stallLimit = 50 * time.Millisecond
	stop := make(chan struct{})
	srv := answers(t, map[string]http.HandlerFunc{
		"/": func(http.ResponseWriter, *http.Request) { <-stop },
	})
	defer close(stop)
	_, err := fetched(t, newBootstrapper(Options{Root: tlsRoot(t, srv)}), srv.URL+"/x.tgz")
	var failed *downloadError
	if !errors.As(err, &failed) || failed.permanent || !strings.Contains(err.Error(), "timeout") {
		t.Errorf("have %v", err)
	}
}

// A server that takes connections and says nothing is given up sooner.
func TestDownloadWithoutHandshake(t *testing.T) {
	quickRetries(t)
	defer func(limit time.Duration) { connectLimit = limit }(connectLimit)
	if connectLimit != 10*time.Second {
		t.Errorf("a connection may take %v", connectLimit)
	}
	connectLimit = 50 * time.Millisecond
	ln, err := net.Listen("tcp", "127.0.0.1:0") // the kernel takes the connections
	if err != nil {
		t.Fatal(err)
	}
	defer ln.Close()
	source := "https://" + ln.Addr().String() + "/x.tgz"
	_, err = fetched(t, newBootstrapper(Options{Root: t.TempDir()}), source)
	wantFailure(t, source, err, "read its .sha256: net/http: TLS handshake timeout", false)
}

// script is a body that brings one answer after the other, each after its pause.
type script struct {
	answers []answer
	closed  bool
}

type answer struct {
	after time.Duration
	text  string
	err   error
}

func (s *script) Read(p []byte) (int, error) {
	next := s.answers[0]
	s.answers = s.answers[1:]
	time.Sleep(next.after)
	return copy(p, next.text), next.err
}

func (s *script) Close() error {
	s.closed = true
	return nil
}

// A body is given up when it brings nothing for 30 s, whatever it says at last; each byte is news.
func TestStallReader(t *testing.T) {
	for _, tt := range []struct {
		name    string
		answers []answer
		want    string
		stalls  bool
	}{
		{"slow, and whole", []answer{{29 * time.Second, "a", nil}, {29 * time.Second, "b", nil},
			{29 * time.Second, "", io.EOF}}, "ab", false},
		{"the last bytes with the end", []answer{{29 * time.Second, "a", nil},
			{29 * time.Second, "b", io.EOF}}, "ab", false},
		{"nothing is no news", []answer{{20 * time.Second, "a", nil}, {20 * time.Second, "", nil},
			{20 * time.Second, "", io.EOF}}, "a", true},
		{"an end too late", []answer{{1, "a", nil}, {31 * time.Second, "", io.EOF}}, "a", true},
	} {
		synctest.Test(t, func(t *testing.T) {
			ctx, cancel := context.WithCancelCause(t.Context())
			stalled := errors.New("stalled")
			body := &script{answers: tt.answers}
			r := &stallReader{ReadCloser: body, ctx: ctx, cancel: cancel,
				timer: time.AfterFunc(stallLimit, func() { cancel(stalled) })}
			have, err := io.ReadAll(r)
			if string(have) != tt.want || errors.Is(err, stalled) != tt.stalls || !tt.stalls && err != nil {
				t.Errorf("%s: %q, %v", tt.name, have, err)
			}
			if err := r.Close(); err != nil || !body.closed || ctx.Err() == nil {
				t.Errorf("%s: closed: %v, %v, %v", tt.name, body.closed, ctx.Err(), err)
			}
			time.Sleep(time.Hour)
			if !tt.stalls && errors.Is(context.Cause(ctx), stalled) {
				t.Errorf("%s: its timer has outlived it", tt.name)
			}
		})
	}
}

// A source's own authority is not trusted, only the VM's.
func TestDownloadTrust(t *testing.T) {
	quickRetries(t)
	srv := answers(t, map[string]http.HandlerFunc{"/x.tgz": says("the archive")})
	_, err := fetched(t, newBootstrapper(Options{Root: t.TempDir()}), srv.URL+"/x.tgz")
	if err == nil || !strings.Contains(err.Error(), "certificate") {
		t.Errorf("have %v", err)
	}
}
