package bundle

import (
	"archive/tar"
	"compress/gzip"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"strings"
)

// Why a file of a bundle could not be read. Test for them with errors.Is.
var (
	ErrNotBundle = errors.New("not a bundle; `service-proxy-agent bundle` makes one")
	ErrNoFile    = errors.New("no such file in the bundle")
	ErrCut       = errors.New("the bundle is cut off or damaged; copy it once more")
	ErrTooBig    = errors.New("bigger than a bundle ever is")
)

const (
	mostOfFile   = 128 << 20 // of one file
	mostOfBundle = 1 << 30   // of all, unpacked: a few kilobytes of gzip may be that much
	mostOfFirst  = 1 << 20   // of the manifest
)

// Read returns one file of the bundle at path. A bundle comes from elsewhere: nothing of it is
// written to disk, and no more of it is held than that file.
func Read(path, name string) ([]byte, error) {
	data, err := readFile(path, name)
	if err != nil {
		return nil, fmt.Errorf("read %s of %q: %w", name, path, err)
	}
	return data, nil
}

func readFile(path, name string) ([]byte, error) {
	f, err := os.Open(path)
	if err != nil {
		return nil, errors.Unwrap(err) // the caller names the path
	}
	defer f.Close()
	if info, err := f.Stat(); err == nil && info.IsDir() {
		return nil, fmt.Errorf("%w: it is a folder; name the .tgz", ErrNotBundle)
	}
	return read(f, name, mostOfBundle)
}

// read finds the file in the archive, of which it unpacks so much at most. The first file must be a
// manifest.
func read(from io.Reader, name string, most int64) ([]byte, error) {
	zip, err := gzip.NewReader(from)
	if errors.Is(err, io.EOF) {
		return nil, ErrCut // nothing is there
	}
	if err != nil {
		return nil, unreadable(err, true)
	}
	limited := &io.LimitedReader{R: zip, N: most}
	archive := tar.NewReader(limited)
	for first := true; ; first = false {
		header, err := archive.Next()
		switch {
		case limited.N == 0:
			return nil, ErrTooBig
		case errors.Is(err, io.EOF) && !first:
			return nil, ErrNoFile
		case err != nil:
			return nil, unreadable(err, first)
		}
		_, base, _ := strings.Cut(header.Name, "/")
		wanted := header.Typeflag == tar.TypeReg && base == name
		if !first && !wanted {
			continue
		}
		size := int64(mostOfFile)
		if first {
			if base != ManifestFile || header.Typeflag != tar.TypeReg {
				return nil, ErrNotBundle
			}
			size = mostOfFirst
		}
		if header.Size > size {
			return nil, ErrTooBig
		}
		data, err := io.ReadAll(archive)
		if limited.N == 0 {
			return nil, ErrTooBig
		}
		if err != nil {
			return nil, unreadable(err, false)
		}
		if first {
			if err := known(data); err != nil {
				return nil, err
			}
		}
		if wanted {
			return data, nil
		}
	}
}

// unreadable says what it means that the archive cannot be read. Where not even its first file
// begins it is something else, unless it just ends.
func unreadable(err error, first bool) error {
	ends := errors.Is(err, io.ErrUnexpectedEOF)
	if first && !ends {
		return ErrNotBundle
	}
	if ends {
		return ErrCut
	}
	return fmt.Errorf("%w: %w", ErrCut, err)
}

// known says whether this program knows bundles with that manifest.
func known(manifest []byte) error {
	var m struct{ Schema string }
	err := json.Unmarshal(manifest, &m)
	switch {
	case err != nil || !strings.HasPrefix(m.Schema, "service-proxy-agent/bundle/"):
		return ErrNotBundle
	case m.Schema != Schema:
		return fmt.Errorf("%w: it is of schema %.60q, and this program knows %q; use a newer one",
			errors.ErrUnsupported, m.Schema, Schema)
	}
	return nil
}
