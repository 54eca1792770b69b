package bootstrap

import (
	"archive/tar"
	"bufio"
	"compress/gzip"
	"debug/elf"
	"errors"
	"fmt"
	"io"
	"os"
	"path"
	"runtime"
	"strings"
)

// envoyInArchive is where an Envoy archive, made to be unpacked at /, holds the binary.
const envoyInArchive = "usr/local/bin/envoy"

const (
	maxUnpacked = 1 << 30 // Envoy with its symbols is a few hundred MB
	maxRatio    = 100     // unpacked to packed; Envoy's is about 3
	anyRatio    = 1 << 20 // up to this size any ratio will do
)

var errArchive = errors.New("bad archive")

// unpackEnvoy copies the Envoy binary in the .tgz archive to into, and nothing else: nothing of an
// archive decides where anything is written. An archive that tries (.., links, devices, setuid) is
// refused as a whole: whoever made it meant something else than we do.
func unpackEnvoy(archive io.Reader, into io.Writer) error {
	packed := &counter{r: archive}
	gz, err := gzip.NewReader(bufio.NewReader(packed))
	if err != nil {
		return fmt.Errorf("%w: %w", errArchive, err)
	}
	limit := func(n int64) error { return checkSize(packed.n, n) }
	unpacked := &counter{r: gz, check: limit}
	entries := tar.NewReader(unpacked)
	found := false
	for {
		header, err := entries.Next()
		if err == io.EOF {
			break
		}
		if err != nil {
			return archiveError(err)
		}
		if err := checkEntry(header); err != nil {
			return err
		}
		if header.Typeflag != tar.TypeReg || path.Clean("/"+header.Name) != "/"+envoyInArchive {
			continue
		}
		if found {
			return fmt.Errorf("%w: it holds %s twice", errArchive, envoyInArchive)
		}
		found = true
		// What is written has a limit of its own: a tar reader can give more than it reads (sparse
		// entries).
		if _, err := io.Copy(into, &counter{r: entries, check: limit}); err != nil {
			return archiveError(err)
		}
	}
	// To the end: gzip's checksum stands there.
	if _, err := io.Copy(io.Discard, unpacked); err != nil {
		return archiveError(err)
	}
	if !found {
		return fmt.Errorf("%w: it holds no %s", errArchive, envoyInArchive)
	}
	return nil
}

// checkSize refuses an archive that has unpacked to more than an Envoy can be. A small one is let
// pass whatever its ratio: folders and licences pack well.
func checkSize(packed, unpacked int64) error {
	if unpacked > maxUnpacked || unpacked > anyRatio && unpacked > maxRatio*packed {
		return fmt.Errorf("%w: it unpacks to more than %d MB or %d times its size",
			errArchive, maxUnpacked>>20, maxRatio)
	}
	return nil
}

// checkEntry refuses an entry that is more than a plain file or folder.
func checkEntry(header *tar.Header) error {
	name := fmt.Sprintf("%.100q", header.Name)
	for _, part := range strings.Split(header.Name, "/") {
		if part == ".." {
			return fmt.Errorf("%w: entry %s leaves its folder", errArchive, name)
		}
	}
	switch header.Typeflag {
	case tar.TypeReg, tar.TypeDir, tar.TypeXGlobalHeader:
	case tar.TypeSymlink, tar.TypeLink:
		return fmt.Errorf("%w: entry %s is a link", errArchive, name)
	default:
		return fmt.Errorf("%w: entry %s is neither a file nor a folder", errArchive, name)
	}
	for key := range header.PAXRecords {
		if strings.HasPrefix(key, "GNU.sparse.") {
			return fmt.Errorf("%w: entry %s has holes (GNU sparse); pack it without --sparse",
				errArchive, name)
		}
	}
	if header.Mode&0o6000 != 0 {
		return fmt.Errorf("%w: entry %s is setuid or setgid", errArchive, name)
	}
	return nil
}

// archiveError tells a damaged archive from a disk that cannot be written.
func archiveError(err error) error {
	var pathErr *os.PathError
	if errors.As(err, &pathErr) || errors.Is(err, errArchive) {
		return err
	}
	if errors.Is(err, io.ErrUnexpectedEOF) {
		return fmt.Errorf("%w: it ends early", errArchive)
	}
	return fmt.Errorf("%w: %w", errArchive, err)
}

// counter counts what is read of r, and refuses more once check does.
type counter struct {
	r     io.Reader
	n     int64
	check func(int64) error
}

func (c *counter) Read(p []byte) (int, error) {
	n, err := c.r.Read(p)
	c.n += int64(n)
	if c.check != nil {
		if bad := c.check(c.n); bad != nil {
			return 0, bad
		}
	}
	return n, err
}

// machines are those that Envoy is built for, by Go's name.
var machines = map[string]elf.Machine{"amd64": elf.EM_X86_64, "arm64": elf.EM_AARCH64}

// checkBinary says that the file is a program for this machine.
func checkBinary(name string) error {
	f, err := elf.Open(name)
	if err != nil {
		var format *elf.FormatError
		if errors.As(err, &format) || errors.Is(err, io.EOF) {
			return errors.New("it is not an ELF program")
		}
		return err
	}
	defer f.Close()
	want := machines[runtime.GOARCH]
	if f.Machine != want {
		return fmt.Errorf("it is a program for %v, and this VM is %v", f.Machine, want)
	}
	return nil
}
