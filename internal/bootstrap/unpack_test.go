package bootstrap

import (
	"archive/tar"
	"bytes"
	"compress/gzip"
	"debug/elf"
	"encoding/binary"
	"errors"
	"io"
	"io/fs"
	"maps"
	"os"
	"path/filepath"
	"runtime"
	"strings"
	"testing"
)

// An archive may unpack to 1 GB and to 100 times its size, and the first MB to anything.
func TestCheckSize(t *testing.T) {
	const mb = 1 << 20
	for _, tt := range []struct {
		packed, unpacked int64
		refused          bool
	}{
		{0, 0, false},
		{1, mb, false},
		{1, mb + 1, true},
		{mb, 100 * mb, false},
		{mb, 100*mb + 1, true},
		{300 * mb, 1024 * mb, false},
		{300 * mb, 1024*mb + 1, true},
	} {
		err := checkSize(tt.packed, tt.unpacked)
		if (err != nil) != tt.refused {
			t.Errorf("%d from %d bytes: %v", tt.unpacked, tt.packed, err)
		}
		const want = "bad archive: it unpacks to more than 1024 MB or 100 times its size"
		if err != nil && (err.Error() != want || !errors.Is(err, errArchive)) {
			t.Errorf("have %q, want %q", err, want)
		}
	}
}

// A counter hands on nothing of what is too much.
func TestCounter(t *testing.T) {
	refused := errors.New("too much")
	c := &counter{r: strings.NewReader("12345678"), check: func(n int64) error {
		if n > 6 {
			return refused
		}
		return nil
	}}
	buf := make([]byte, 3)
	for i, want := range []struct {
		n   int
		err error
	}{{3, nil}, {3, nil}, {0, refused}} {
		if n, err := c.Read(buf); n != want.n || !errors.Is(err, want.err) {
			t.Errorf("read %d: %d, %v", i, n, err)
		}
	}
	if c.n != 8 {
		t.Errorf("counted %d bytes", c.n)
	}
}

// What an archive may hold beside Envoy, and what it may not, each by its name.
func TestUnpackEntries(t *testing.T) {
	const name = "usr/local/bin/envoy"
	typed := func(flag byte, name string, mode int64) entry {
		return entry{tar.Header{Name: name, Mode: mode, Typeflag: flag}, ""}
	}
	global := entry{tar.Header{Typeflag: tar.TypeXGlobalHeader,
		PAXRecords: map[string]string{"comment": "git archive writes one"}}, ""}
	long := strings.Repeat("x", 90) + "/" + strings.Repeat("y", 90)
	for _, tt := range []struct {
		what    string
		entries []entry
		fails   string
	}{
		{"a global header", []entry{global, file(name, "envoy")}, ""},
		{"a folder of Envoy's name", []entry{typed(tar.TypeDir, name, 0o755), file(name, "envoy")}, ""},
		{"sticky folder", []entry{typed(tar.TypeDir, "tmp/", 0o1777), file(name, "envoy")}, ""},
		{"dots that are no ..", []entry{file("a/..b/...", ""), file(name, "envoy")}, ""},
		{"no Envoy", []entry{file("envoy", "envoy")}, "bad archive: it holds no usr/local/bin/envoy"},
		{"two", []entry{file(name, "envoy"), file("./"+name, "envoy")},
			"bad archive: it holds usr/local/bin/envoy twice"},
		{"setgid", []entry{file(name, "envoy"), typed(tar.TypeReg, "a", 0o2755)},
			`bad archive: entry "a" is setuid or setgid`},
		{"setuid", []entry{file(name, "envoy"), typed(tar.TypeReg, "a", 0o4755)},
			`bad archive: entry "a" is setuid or setgid`},
		{"..", []entry{file(name, "envoy"), file("a/..", "")},
			`bad archive: entry "a/.." leaves its folder`},
		{"character device", []entry{typed(tar.TypeChar, "null", 0o644)},
			`bad archive: entry "null" is neither a file nor a folder`},
		{"a long name is cut", []entry{typed(tar.TypeFifo, long, 0o644)},
			`bad archive: entry "` + long[:100] + `" is neither a file nor a folder`},
	} {
		var into bytes.Buffer
		err := unpackEnvoy(bytes.NewReader(pack(t, tt.entries...)), &into)
		if tt.fails == "" {
			if err != nil || into.String() != "envoy" {
				t.Errorf("%s: have %q, %v", tt.what, into.String(), err)
			}
			continue
		}
		if !errors.Is(err, errArchive) || err.Error() != tt.fails {
			t.Errorf("%s: have %v, want %s", tt.what, err, tt.fails)
		}
	}
}

// Behind the archive's end, where a tar reader looks no more, is a bomb as well.
func TestUnpackBombBehindTheEnd(t *testing.T) {
	var out bytes.Buffer
	gz := gzip.NewWriter(&out)
	w := tar.NewWriter(gz)
	err := errors.Join(w.WriteHeader(&tar.Header{Name: "usr/local/bin/envoy", Mode: 0o755, Size: 5}))
	_, werr := io.WriteString(w, "envoy")
	if err := errors.Join(err, werr, w.Close()); err != nil {
		t.Fatal(err)
	}
	zeros := make([]byte, 1<<20)
	for range 8 {
		if _, err := gz.Write(zeros); err != nil {
			t.Fatal(err)
		}
	}
	if err := gz.Close(); err != nil {
		t.Fatal(err)
	}
	if err := unpackEnvoy(&out, io.Discard); !errors.Is(err, errArchive) ||
		!strings.Contains(err.Error(), "times its size") {
		t.Errorf("have %v", err)
	}
}

// An archive that ends early, wherever that is, is a bad one, and its error says no more than that.
func TestUnpackCutAnywhere(t *testing.T) {
	whole := pack(t, file("usr/local/bin/envoy", "envoy"))
	for n := range whole {
		err := unpackEnvoy(bytes.NewReader(whole[:n]), io.Discard)
		if !errors.Is(err, errArchive) {
			t.Errorf("%d of %d bytes: %v", n, len(whole), err)
		}
		if n > 10 && err.Error() != "bad archive: it ends early" { // 10: gzip's header
			t.Errorf("%d of %d bytes: %v", n, len(whole), err)
		}
	}
}

// elfFile writes the header of a program for a machine.
func elfFile(t *testing.T, machine elf.Machine) string {
	t.Helper()
	text := []byte(fakeBinary(t, ""))
	binary.LittleEndian.PutUint16(text[18:], uint16(machine)) // e_machine
	name := filepath.Join(t.TempDir(), "envoy")
	write(t, name, string(text))
	return name
}

func TestCheckBinaryIsForThisMachine(t *testing.T) {
	here := map[string]elf.Machine{"amd64": elf.EM_X86_64, "arm64": elf.EM_AARCH64}
	if !maps.Equal(machines, here) {
		t.Errorf("Envoy is built for %v", machines)
	}
	for arch, machine := range here {
		err := checkBinary(elfFile(t, machine))
		want := ""
		if arch != runtime.GOARCH {
			want = "it is a program for " + machine.String() +
				", and this VM is " + here[runtime.GOARCH].String()
		}
		if (err != nil) != (want != "") || err != nil && err.Error() != want {
			t.Errorf("%v: %v, want %q", machine, err, want)
		}
	}
	empty := filepath.Join(t.TempDir(), "empty")
	write(t, empty, "")
	if err := checkBinary(empty); err == nil || err.Error() != "it is not an ELF program" {
		t.Errorf("an empty file: %v", err)
	}
	write(t, empty, strings.Repeat("x", 100))
	if err := checkBinary(empty); err == nil || err.Error() != "it is not an ELF program" {
		t.Errorf("another file: %v", err)
	}
	if err := os.Remove(empty); err != nil {
		t.Fatal(err)
	}
	if err := checkBinary(empty); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("no file: %v", err)
	}
}
