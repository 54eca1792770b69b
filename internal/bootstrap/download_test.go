package bootstrap

import (
	"archive/tar"
	"bytes"
	"compress/gzip"
	"context"
	"crypto/sha256"
	"encoding/hex"
	"encoding/pem"
	"errors"
	"fmt"
	"io"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/service-proxy-agent/service-proxy-agent/internal/authorities"
	"github.com/service-proxy-agent/service-proxy-agent/test/platform"
)

// tlsRoot is a root folder whose CA file trusts the server.
func tlsRoot(t *testing.T, srv *httptest.Server) string {
	t.Helper()
	root := t.TempDir()
	ca := filepath.Join(root, authorities.Files[0])
	if err := os.MkdirAll(filepath.Dir(ca), 0o755); err != nil {
		t.Fatal(err)
	}
	text := pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: srv.Certificate().Raw})
	if err := os.WriteFile(ca, text, 0o644); err != nil {
		t.Fatal(err)
	}
	return root
}

// quickRetries has downloads tried as often as ever, without the pauses.
func quickRetries(t *testing.T) {
	t.Helper()
	pauses := retryPauses
	t.Cleanup(func() { retryPauses = pauses })
	retryPauses = nil
	for range pauses {
		retryPauses = append(retryPauses, time.Millisecond)
	}
}

func TestDownload(t *testing.T) {
	quickRetries(t)
	content := []byte("the archive")
	sum := sha256.Sum256(content)
	hexSum := hex.EncodeToString(sum[:])
	mux := http.NewServeMux()
	serve := func(path string, code int, body string) {
		mux.HandleFunc(path, func(w http.ResponseWriter, _ *http.Request) {
			w.WriteHeader(code)
			_, _ = io.WriteString(w, body)
		})
	}
	serve("/good.tgz", 200, string(content))
	serve("/beside.tgz", 200, string(content))
	serve("/beside.tgz.sha256", 200, strings.ToUpper(hexSum)+"  beside.tgz\n")
	serve("/wrong.tgz", 200, string(content))
	serve("/wrong.tgz.sha256", 200, strings.Repeat("0", 64))
	serve("/nonsense.tgz", 200, string(content))
	serve("/nonsense.tgz.sha256", 200, "<html>")
	serve("/nolist.tgz", 200, string(content))
	serve("/nolist.tgz.sha256", 403, "")
	serve("/down.tgz.sha256", 503, "")
	serve("/busy.tgz", 503, "")
	serve("/gone.tgz", 404, "")
	mux.HandleFunc("/plain.tgz", func(w http.ResponseWriter, r *http.Request) {
		http.Redirect(w, r, "http://127.0.0.1:1/x", http.StatusFound)
	})
	mux.HandleFunc("/lost.tgz", func(w http.ResponseWriter, _ *http.Request) {
		w.Header().Set("Location", "/x%zz?sig=SECRET") // net/http quotes what it cannot follow
		w.WriteHeader(http.StatusFound)
	})
	mux.HandleFunc("/short.tgz", func(w http.ResponseWriter, _ *http.Request) {
		w.Header().Set("Content-Length", "1000")
		_, _ = w.Write(content)
	})
	srv := httptest.NewTLSServer(mux)
	defer srv.Close()
	local := filepath.Join(t.TempDir(), "local.tgz")
	if err := os.WriteFile(local, content, 0o644); err != nil {
		t.Fatal(err)
	}
	b := newBootstrapper(Options{Root: tlsRoot(t, srv)})
	for _, tt := range []struct {
		source    string
		fails     string // in the error; "": none
		permanent bool
	}{
		{srv.URL + "/good.tgz", "", false},
		{srv.URL + "/good.tgz?sig=SECRET#sha256=" + hexSum, "", false},
		{srv.URL + "/good.tgz#sha256=" + strings.ToUpper(hexSum), "", false},
		{srv.URL + "/good.tgz?sig=SECRET#sha256=" + strings.Repeat("0", 64), "wrong checksum", true},
		{srv.URL + "/good.tgz#md5=00", "want #sha256=", true},
		{srv.URL + "/good.tgz#sha256=00", "want #sha256=", true},
		{srv.URL + "/beside.tgz", "", false},
		{srv.URL + "/wrong.tgz", "wrong checksum", true},
		{srv.URL + "/nonsense.tgz", "64 hex digits", true},
		{srv.URL + "/nolist.tgz", "", false},
		{srv.URL + "/down.tgz", "read its .sha256: status 503", false},
		{srv.URL + "/busy.tgz?sig=SECRET", "status 503", false},
		{srv.URL + "/gone.tgz?sig=SECRET", "status 404", true},
		{srv.URL + "/plain.tgz", "redirected away from https", true},
		{srv.URL + "/lost.tgz", "invalid URL escape", false},
		{srv.URL + "/short.tgz", "unexpected EOF", false},
		{"https://127.0.0.1:1/x.tgz?sig=SECRET", "refused", false},
		{"file://" + local + "#sha256=" + hexSum, "", false},
		{"file://" + local + ".none", "no such file", true},
		{"file://" + filepath.Dir(local), "not a regular file", true},
		{"ftp://h/x", "none of gs, https, file", true},
	} {
		into, err := os.Create(filepath.Join(t.TempDir(), "into"))
		if err != nil {
			t.Fatal(err)
		}
		err = b.download(context.Background(), tt.source, into)
		if tt.fails == "" {
			have, readErr := io.ReadAll(into)
			if err != nil || readErr != nil || !bytes.Equal(have, content) {
				t.Errorf("%s: have %q, %v, %v", tt.source, have, err, readErr)
			}
			continue
		}
		var download *downloadError
		if !errors.As(err, &download) || !strings.Contains(err.Error(), tt.fails) ||
			download.permanent != tt.permanent {
			t.Errorf("%s: have %v (permanent: %v), want …%s… (%v)", tt.source, err,
				download != nil && download.permanent, tt.fails, tt.permanent)
		}
		if err != nil && strings.Contains(err.Error(), "SECRET") {
			t.Errorf("%s: the error shows the query: %v", tt.source, err)
		}
		into.Close()
	}
}

// An https:// source that is private in Cloud Storage: refused with 403, its .sha256 too, which for
// a public one means that there is none.
func TestDownloadPrivate(t *testing.T) {
	quickRetries(t)
	cloud := platform.New(platform.VM{})
	cloud.PutObject("private", "x.tgz", []byte("the archive"))
	cloud.PutObject("public", "x.tgz", []byte("the archive"))
	cloud.MakePublic("public")
	srv := httptest.NewTLSServer(cloud)
	defer srv.Close()
	b := newBootstrapper(Options{Root: tlsRoot(t, srv)})
	for path, want := range map[string]string{
		"/public/x.tgz": "",
		"/private/x.tgz": "status 403 Forbidden: it is not public, or not there; " +
			"a private object of Cloud Storage is gs://BUCKET/OBJECT",
	} {
		into, err := os.Create(filepath.Join(t.TempDir(), "into"))
		if err != nil {
			t.Fatal(err)
		}
		defer into.Close()
		err = b.download(t.Context(), srv.URL+path, into)
		var download *downloadError
		refused := errors.As(err, &download) && download.permanent &&
			strings.HasSuffix(err.Error(), want)
		if want == "" && err != nil || want != "" && !refused {
			t.Errorf("%s: %v, want %q", path, err, want)
		}
	}
}

// A server that stops in the middle is given up; one that is slow is not.
func TestDownloadStalls(t *testing.T) {
	quickRetries(t)
	defer func(limit time.Duration) { stallLimit = limit }(stallLimit)
	stallLimit = 300 * time.Millisecond
	stop := make(chan struct{})
	mux := http.NewServeMux()
	mux.HandleFunc("/stall.tgz", func(w http.ResponseWriter, r *http.Request) {
		_, _ = io.WriteString(w, "x")
		w.(http.Flusher).Flush()
		select {
		case <-stop:
		case <-r.Context().Done():
		}
	})
	mux.HandleFunc("/slow.tgz", func(w http.ResponseWriter, _ *http.Request) {
		for range 8 {
			_, _ = io.WriteString(w, "x")
			w.(http.Flusher).Flush()
			time.Sleep(100 * time.Millisecond)
		}
	})
	srv := httptest.NewTLSServer(mux)
	defer srv.Close()
	defer close(stop)
	b := newBootstrapper(Options{Root: tlsRoot(t, srv)})
	for name, want := range map[string]string{"/stall.tgz": "nothing received for 300ms",
		"/slow.tgz": ""} {
		into, err := os.Create(filepath.Join(t.TempDir(), "into"))
		if err != nil {
			t.Fatal(err)
		}
		err = b.download(context.Background(), srv.URL+name, into)
		if want == "" && err != nil || want != "" &&
			(err == nil || !strings.Contains(err.Error(), want)) {
			t.Errorf("%s: have %v, want %q", name, err, want)
		}
		into.Close()
	}
}

type entry struct {
	tar.Header
	content string
}

func pack(t *testing.T, entries ...entry) []byte {
	t.Helper()
	var out bytes.Buffer
	gz := gzip.NewWriter(&out)
	w := tar.NewWriter(gz)
	for _, e := range entries {
		e.Size = int64(len(e.content))
		if err := w.WriteHeader(&e.Header); err != nil {
			t.Fatal(err)
		}
		if _, err := io.WriteString(w, e.content); err != nil {
			t.Fatal(err)
		}
	}
	if err := errors.Join(w.Close(), gz.Close()); err != nil {
		t.Fatal(err)
	}
	return out.Bytes()
}

func file(name, content string) entry {
	return entry{tar.Header{Name: name, Mode: 0o755, Typeflag: tar.TypeReg}, content}
}

func TestUnpackEnvoy(t *testing.T) {
	good := pack(t, entry{tar.Header{Name: "usr/local/bin/", Mode: 0o755, Typeflag: tar.TypeDir}, ""},
		file("usr/share/doc/envoy/LICENSE", "licence"), file("usr/local/bin/envoy", "envoy"),
		file("etc/passwd", "ignored"))
	flipped := bytes.Clone(good)
	flipped[len(flipped)-6] ^= 1 // in gzip's checksum
	for _, tt := range []struct {
		name    string
		archive []byte
		fails   string
	}{
		{"good", good, ""},
		{"with ./", pack(t, file("./usr/local/bin/envoy", "envoy")), ""},
		{"absolute name", pack(t, file("/usr/local/bin/envoy", "envoy")), ""},
		{"empty", nil, "EOF"},
		{"not gzip", []byte("<html>not found</html>"), "gzip: invalid header"},
		{"truncated", good[:len(good)-20], "it ends early"},
		{"wrong gzip checksum", flipped, "gzip: invalid checksum"},
		{"no envoy", pack(t, file("usr/bin/envoy", "envoy")), "it holds no usr/local/bin/envoy"},
		{"twice", pack(t, file("usr/local/bin/envoy", "envoy"), file("usr/local/bin/envoy", "evil")), "twice"},
		{"..", pack(t, file("usr/local/bin/envoy", "envoy"), file("../../etc/cron.d/evil", "evil")), "leaves its folder"},
		{".. that stays inside", pack(t, file("usr/local/lib/../bin/envoy", "envoy")), "leaves its folder"},
		{"symlink", pack(t, entry{tar.Header{Name: "usr/local/bin/envoy", Linkname: "/etc/shadow", Typeflag: tar.TypeSymlink}, ""}), "is a link"},
		{"symlink elsewhere", pack(t, entry{tar.Header{Name: "usr/local/bin", Linkname: "/etc", Typeflag: tar.TypeSymlink}, ""}, file("usr/local/bin/envoy", "envoy")), "is a link"},
		{"hard link", pack(t, entry{tar.Header{Name: "usr/local/bin/envoy", Linkname: "/etc/shadow", Typeflag: tar.TypeLink}, ""}), "is a link"},
		{"device", pack(t, entry{tar.Header{Name: "dev/sda", Typeflag: tar.TypeBlock}, ""}), "neither a file nor a folder"},
		{"fifo", pack(t, entry{tar.Header{Name: "fifo", Typeflag: tar.TypeFifo}, ""}), "neither a file nor a folder"},
		{"setuid", pack(t, entry{tar.Header{Name: "usr/local/bin/envoy", Mode: 0o4755, Typeflag: tar.TypeReg}, "envoy"}), "setuid"},
		{"bomb", pack(t, file("usr/local/bin/envoy", strings.Repeat("\x00", 64<<20))), "times its size"},
		{"sparse, 0.1", packSparse(t, map[string]string{"GNU.sparse.major": "0", "GNU.sparse.minor": "1", "GNU.sparse.numblocks": "1",
			"GNU.sparse.map": "3221225472,0", "GNU.sparse.size": "3221225472", "GNU.sparse.name": "usr/local/bin/envoy"}, ""), "has holes"},
		{"sparse, 1.0", packSparse(t, map[string]string{"GNU.sparse.major": "1", "GNU.sparse.minor": "0",
			"GNU.sparse.realsize": "3221225472", "GNU.sparse.name": "usr/local/bin/envoy"}, "1\n3221225472\n0\n"+strings.Repeat("\x00", 512-15)), "has holes"},
	} {
		into := limited{limit: 128 << 20}
		err := unpackEnvoy(bytes.NewReader(tt.archive), &into)
		if tt.fails == "" {
			if err != nil || into.String() != "envoy" {
				t.Errorf("%s: have %q, %v", tt.name, into.String(), err)
			}
			continue
		}
		if !errors.Is(err, errArchive) || !strings.Contains(err.Error(), tt.fails) {
			t.Errorf("%s: have %v, want %q", tt.name, err, tt.fails)
		}
	}
	// A disk that cannot be written is not the archive's fault.
	full := &os.PathError{Op: "write", Path: "x", Err: errors.New("no space")}
	if err := unpackEnvoy(bytes.NewReader(good), failingWriter{full}); errors.Is(err, errArchive) ||
		!errors.Is(err, full) {
		t.Errorf("have %v, want the writer's own error", err)
	}
}

// packSparse packs one file with the PAX records of GNU tar's sparse formats (info tar, "Sparse
// Formats"), which Go's writer refuses to write.
func packSparse(t *testing.T, records map[string]string, content string) []byte {
	t.Helper()
	var pax strings.Builder
	for key, value := range records {
		size := len(key) + len(value) + 3 // space, =, newline, and the number itself
		for size != len(key)+len(value)+3+len(fmt.Sprint(size)) {
			size = len(key) + len(value) + 3 + len(fmt.Sprint(size))
		}
		fmt.Fprintf(&pax, "%d %s=%s\n", size, key, value)
	}
	var out bytes.Buffer
	gz := gzip.NewWriter(&out)
	block := func(name string, flag byte, content string) {
		header := make([]byte, 512)
		copy(header, name)
		copy(header[100:], "0000755\x000000000\x000000000\x00")
		copy(header[124:], fmt.Sprintf("%011o\x0000000000000\x00        ", len(content)))
		header[156] = flag
		copy(header[257:], "ustar\x0000")
		sum := 0
		for _, b := range header {
			sum += int(b)
		}
		copy(header[148:], fmt.Sprintf("%06o\x00 ", sum))
		_, _ = gz.Write(header)
		_, _ = io.WriteString(gz, content+strings.Repeat("\x00", -len(content)&511))
	}
	block("PaxHeaders/envoy", 'x', pax.String())
	block("usr/local/bin/envoy", '0', content)
	_, _ = gz.Write(make([]byte, 1024))
	if err := gz.Close(); err != nil {
		t.Fatal(err)
	}
	return out.Bytes()
}

// limited is a buffer that fails rather than fill the memory.
type limited struct {
	text  []byte
	limit int
}

func (l *limited) String() string { return string(l.text) }

func (l *limited) Write(p []byte) (int, error) {
	if len(l.text)+len(p) > l.limit {
		return 0, &os.PathError{Op: "write", Path: "x", Err: errors.New("the test's own limit")}
	}
	l.text = append(l.text, p...)
	return len(p), nil
}

type failingWriter struct{ err error }

func (w failingWriter) Write([]byte) (int, error) { return 0, w.err }

func TestCheckBinary(t *testing.T) {
	script := filepath.Join(t.TempDir(), "envoy")
	if err := os.WriteFile(script, []byte("#!/bin/sh\n"), 0o755); err != nil {
		t.Fatal(err)
	}
	if err := checkBinary(script); err == nil || !strings.Contains(err.Error(), "ELF") {
		t.Errorf("a script: %v", err)
	}
	self, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	if err := checkBinary(self); err != nil {
		t.Errorf("this test's own program: %v", err)
	}
}

func TestRedact(t *testing.T) {
	for source, want := range map[string]string{
		"https://user:pass@host/a.tgz?sig=x#sha256=y": "https://host/a.tgz",
		"gs://bucket/dir/a.tgz":                       "gs://bucket/dir/a.tgz",
		"https://h/%zz":                               "(malformed URL)",
	} {
		if have := redact(source); have != want {
			t.Errorf("%s: have %s, want %s", source, have, want)
		}
	}
}

func TestBackoff(t *testing.T) {
	for attempt := 1; attempt < 100; attempt++ {
		for _, permanent := range []bool{false, true} {
			most := 66 * time.Second
			if permanent {
				most = 330 * time.Second
			}
			if d := backoff(attempt, permanent); d < 2*time.Second || d > most {
				t.Fatal(fmt.Sprint("attempt ", attempt, ", permanent ", permanent, ": ", d))
			}
		}
	}
}
