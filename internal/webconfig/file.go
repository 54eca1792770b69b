// Package webconfig reads the web config file of Prometheus' exporters (exporter-toolkit, see its
// docs/web-configuration.md): TLS, client certificates, users with bcrypt hashes, a few headers and
// a rate limit.
//
// It is not the toolkit's own package, which adds 9.1 MB to a binary of 16.2 MB: a client
// configuration with OAuth comes along, and html/template, for which the linker keeps every
// exported method of the program. These lines add 0.8 MB: a YAML reader, bcrypt, and the server's
// side of crypto/tls, which the program did not have.
//
// It differs where the toolkit would open what somebody meant to close, or let a caller have the
// processor. A file that sets nothing is refused; so are client certificates that nothing verifies,
// and hashes that take seconds. While a file is broken the last good one stays in force. Wrong
// passwords cost a tenth of a processor, whoever sends how many.
//
// Package internal/server listens, and puts [File.TLS] and [File.Guard] before its pages.
package webconfig

import (
	"crypto/tls"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"os/user"
	"path/filepath"
	"strconv"
	"sync"
	"sync/atomic"
	"syscall"
	"time"

	"golang.org/x/time/rate"
)

// maxFile bounds each file, in bytes.
const maxFile = 1 << 20

// File is a web config file with the files that it names. Make it with [Open]. Its methods may be
// called at the same time.
type File struct {
	path      string
	passwords *passwords

	mu   sync.Mutex // held by Load
	good atomic.Pointer[inForce]
}

// inForce is what a file said when it was last good.
type inForce struct {
	config  config
	text    string
	pems    pems
	tls     *tls.Config   // nil: plain HTTP
	limiter *rate.Limiter // nil: none
}

// Open returns the file of that path, which is not read before [File.Load].
//
//	f := webconfig.Open("/etc/service-proxy-agent/web-config.yml")
//	if err := f.Load(); err != nil { … }
//	http.Serve(tls.NewListener(l, f.TLS()), f.Guard(handler, caller))
func Open(path string) *File {
	return &File{path: path, passwords: newPasswords()}
}

// Load reads the file and those it names, and puts them in force if they changed. After an error,
// which names the file, the line or key and what to do, what was in force stays so.
//
// It compares what it reads: a modification time may be the same after two writes. That takes some
// 50 µs, well below a handshake, so that it can be called for each connection.
func (f *File) Load() error {
	f.mu.Lock()
	defer f.mu.Unlock()
	next, err := f.read(f.good.Load())
	if err != nil {
		return fmt.Errorf("web config file %q: %w", f.path, err)
	}
	f.good.Store(next)
	return nil
}

// read returns what the files say now, which is last if nothing changed.
func (f *File) read(last *inForce) (*inForce, error) {
	text, err := readFile(f.path)
	if err != nil {
		return nil, err
	}
	next := &inForce{text: text}
	if last != nil && last.text == text {
		next.config = last.config
	} else if next.config, err = parse([]byte(text)); err != nil {
		return nil, err
	}
	t := next.config.TLS
	if t != nil {
		next.pems = pems{t.Cert, t.Key, t.ClientCA}
		for i, path := range []string{t.CertFile, t.KeyFile, t.ClientCAFile} {
			if path == "" {
				continue
			}
			if !filepath.IsAbs(path) {
				path = filepath.Join(filepath.Dir(f.path), path)
			}
			if next.pems[i], err = readFile(path); err != nil {
				key := [...]string{"cert_file", "key_file", "client_ca_file"}[i]
				return nil, fmt.Errorf("tls_server_config.%s: %w", key, err)
			}
		}
	}
	if last != nil && last.text == next.text && last.pems == next.pems {
		return last, nil
	}
	if t != nil {
		if next.tls, err = t.serverConfig(next.pems, next.config.HTTP); err != nil {
			return nil, err
		}
	}
	limit := next.config.RateLimit
	switch {
	case last != nil && last.config.RateLimit == limit:
		next.limiter = last.limiter
	case limit.Interval > 0:
		next.limiter = rate.NewLimiter(rate.Every(time.Duration(limit.Interval)), limit.Burst)
	}
	return next, nil
}

// TLS is for a connection that begins now; nil: plain HTTP, or nothing was loaded yet.
func (f *File) TLS() *tls.Config {
	if good := f.good.Load(); good != nil {
		return good.tls
	}
	return nil
}

// readFile reads a regular file of at most [maxFile] bytes; its error says what to do.
func readFile(path string) (string, error) {
	// Opening a FIFO would wait for its writer.
	file, err := os.OpenFile(path, os.O_RDONLY|syscall.O_NONBLOCK, 0)
	switch {
	case errors.Is(err, fs.ErrPermission):
		return "", fmt.Errorf("%w; make it, and the folders above it, readable for the user %s", err,
			agentUser())
	case errors.Is(err, fs.ErrNotExist):
		return "", fmt.Errorf("%w; under systemd the agent sees no files below /home, /root and /tmp",
			err)
	case err != nil:
		return "", err
	}
	defer file.Close()
	if info, err := file.Stat(); err != nil {
		return "", err
	} else if !info.Mode().IsRegular() {
		return "", fmt.Errorf("read %s: it is no regular file", path)
	}
	text, err := io.ReadAll(io.LimitReader(file, maxFile+1))
	if len(text) > maxFile {
		err = fmt.Errorf("read %s: it has more than %d bytes", path, maxFile)
	}
	return string(text), err
}

// agentUser is who this process runs as.
func agentUser() string {
	id := strconv.Itoa(os.Geteuid())
	if u, err := user.LookupId(id); err == nil {
		return u.Username
	}
	return id
}
