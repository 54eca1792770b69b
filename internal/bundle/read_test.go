package bundle

import (
	"archive/tar"
	"bytes"
	"compress/gzip"
	"errors"
	"io"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"
)

func example() Manifest {
	return Manifest{Version: "1.2.3", Time: time.Date(2026, 11, 28, 12, 0, 0, 5, time.Local), Host: "vm-1",
		Files: []File{
			{Name: LookFile, Source: "a look", Redacted: "no", Data: []byte(`{"x":1}`)},
			{Name: "rules/ipv4.txt", Source: "iptables-save -c", Redacted: "lines", Data: []byte("*nat\n")},
			{Name: "empty.txt", Source: "nothing", Redacted: "lines"},
		},
		Gaps: []Gap{{Name: "doctor.txt", Why: "no root"}}}
}

func written(t *testing.T, m Manifest) []byte {
	t.Helper()
	var b bytes.Buffer
	if err := Write(&b, "folder", m); err != nil {
		t.Fatal(err)
	}
	return b.Bytes()
}

// archived is an archive with these files, whatever they are.
func archived(t *testing.T, headers ...tar.Header) []byte {
	t.Helper()
	var b bytes.Buffer
	zip := gzip.NewWriter(&b)
	archive := tar.NewWriter(zip)
	for _, h := range headers {
		body := io.LimitReader(zeros{}, h.Size)
		if h.Name == "f/manifest.json" && h.Typeflag == tar.TypeReg && h.Size < 1000 {
			text := `{"schema":"` + Schema + `"}`
			h.Size, body = int64(len(text)), strings.NewReader(text)
		}
		if err := archive.WriteHeader(&h); err != nil {
			t.Fatal(err)
		}
		if _, err := io.Copy(archive, body); err != nil {
			t.Fatal(err)
		}
	}
	if err := errors.Join(archive.Close(), zip.Close()); err != nil {
		t.Fatal(err)
	}
	return b.Bytes()
}

type zeros struct{}

func (zeros) Read(b []byte) (int, error) {
	clear(b)
	return len(b), nil
}

func TestRead(t *testing.T) {
	path := filepath.Join(t.TempDir(), "b.tgz")
	if err := os.WriteFile(path, written(t, example()), 0o600); err != nil {
		t.Fatal(err)
	}
	for name, want := range map[string]string{
		LookFile: `{"x":1}`, "rules/ipv4.txt": "*nat\n", "empty.txt": ""} {
		if have, err := Read(path, name); err != nil || string(have) != want {
			t.Errorf("%s: %q, %v", name, have, err)
		}
	}
	if have, err := Read(path, ManifestFile); err != nil ||
		!bytes.Contains(have, []byte(`"schema": "`+Schema+`"`)) {
		t.Errorf("%s, %v", have, err)
	}
	if _, err := Read(path, "../b.tgz"); !errors.Is(err, ErrNoFile) {
		t.Error(err)
	}
	if _, err := Read(filepath.Dir(path), LookFile); !errors.Is(err, ErrNotBundle) {
		t.Error(err)
	}
	if _, err := Read(path+".gone", LookFile); !errors.Is(err, os.ErrNotExist) {
		t.Error(err)
	}
}

func TestReadWhatIsNoBundle(t *testing.T) {
	manifest := tar.Header{Typeflag: tar.TypeReg, Name: "f/manifest.json"}
	var plain bytes.Buffer
	zip := gzip.NewWriter(&plain)
	_, _ = zip.Write(bytes.Repeat([]byte("no archive "), 100))
	_ = zip.Close()
	full := written(t, example())
	var newer bytes.Buffer
	zip = gzip.NewWriter(&newer)
	archive := tar.NewWriter(zip)
	text := `{"schema":"service-proxy-agent/bundle/v2"}`
	_ = archive.WriteHeader(&tar.Header{Name: "f/manifest.json", Typeflag: tar.TypeReg, Size: int64(len(text))})
	_, _ = archive.Write([]byte(text))
	_, _ = archive.Close(), zip.Close()
	big := tar.Header{Typeflag: tar.TypeReg, Name: "f/look.json", Size: mostOfFile + 1}
	var many []tar.Header
	for range 9 {
		many = append(many, tar.Header{Typeflag: tar.TypeReg, Name: "f/x", Size: 2 << 20})
	}
	for _, tt := range []struct {
		name string
		data []byte
		want error
	}{
		{"empty", nil, ErrCut},
		{"text", []byte("hello, this is a text"), ErrNotBundle},
		{"gzip of something else", plain.Bytes(), ErrNotBundle},
		{"another archive", archived(t, tar.Header{Typeflag: tar.TypeReg, Name: "f/look.json", Size: 3}), ErrNotBundle},
		{"an archive without a file", archived(t), ErrNotBundle},
		{"a manifest of something else", archived(t, tar.Header{Typeflag: tar.TypeReg, Name: "f/manifest.json", Size: 2000}), ErrNotBundle},
		{"a newer one", newer.Bytes(), errors.ErrUnsupported},
		{"no such file", archived(t, manifest), ErrNoFile},
		{"a link", archived(t, manifest, tar.Header{Typeflag: tar.TypeSymlink, Name: "f/look.json", Linkname: "/etc/shadow"}), ErrNoFile},
		{"cut in its header", full[:5], ErrCut},
		{"cut", full[:len(full)*2/3], ErrCut},
		{"a file that is too big", archived(t, manifest, big), ErrTooBig},
		{"a bomb", archived(t, append([]tar.Header{manifest}, many...)...), ErrTooBig},
	} {
		have, err := read(bytes.NewReader(tt.data), "look.json", 8<<20)
		if !errors.Is(err, tt.want) || have != nil {
			t.Errorf("%s: %d bytes, %v, want %v", tt.name, len(have), err, tt.want)
		}
	}
	// Wherever it is cut, half a file is never taken for a whole one.
	for n := range full {
		have, err := read(bytes.NewReader(full[:n]), LookFile, mostOfBundle)
		if err == nil && string(have) != `{"x":1}` {
			t.Errorf("cut at %d: %q", n, have)
		}
	}
	// A byte that changed is noticed where gzip or the archive can, and nothing panics.
	for n := range full {
		damaged := bytes.Clone(full)
		damaged[n] ^= 0x55
		_, _ = read(bytes.NewReader(damaged), "empty.txt", mostOfBundle)
	}
}

func FuzzRead(f *testing.F) {
	var b bytes.Buffer
	if err := Write(&b, "folder", example()); err != nil {
		f.Fatal(err)
	}
	f.Add(b.Bytes())
	f.Fuzz(func(t *testing.T, data []byte) {
		if have, err := read(bytes.NewReader(data), LookFile, mostOfBundle); err != nil && have != nil {
			t.Errorf("%d bytes and %v", len(have), err)
		}
	})
}
