// runner is the test's hand inside of a VM that has no way in: it runs the commands that come over
// a port of virtio-serial, and stands for the application on the serving port.
//
//	runner              a request is a line of JSON, and so is its answer; many may be under way
//	runner serve ADDR   HTTP
package main

import (
	"bufio"
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"sync"
	"time"
)

// request and answer: what test/vm sends, and what it gets.
type (
	request struct {
		ID      int      `json:"id"`
		Args    []string `json:"args"`
		Stdin   string   `json:"stdin"`
		Seconds int      `json:"seconds"` // limit
	}
	answer struct {
		ID   int    `json:"id"` // 0: the runner has begun
		Out  string `json:"out"`
		Code int    `json:"code"` // -1: did not run, or was killed
		Err  string `json:"err"`
	}
)

func main() {
	log.SetFlags(0)
	if len(os.Args) == 3 && os.Args[1] == "serve" {
		server := &http.Server{Addr: os.Args[2], ReadHeaderTimeout: 10 * time.Second,
			Handler: http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
				fmt.Fprintf(w, "application at %s\n", r.Host)
			})}
		log.Fatal(server.ListenAndServe())
	}
	log.Fatal(answerAll())
}

// answerAll runs what is asked for until the port fails.
func answerAll() error {
	var ports []string
	for len(ports) == 0 { // its driver is loaded meanwhile
		time.Sleep(100 * time.Millisecond)
		ports, _ = filepath.Glob("/dev/vport*p1") // the pattern is good
	}
	port, err := os.OpenFile(ports[0], os.O_RDWR, 0)
	if err != nil {
		return fmt.Errorf("open the port: %w", err)
	}
	var mu sync.Mutex
	send := func(a answer) {
		line, err := json.Marshal(a)
		if err != nil {
			log.Print(err)
			return
		}
		mu.Lock()
		defer mu.Unlock()
		if _, err := port.Write(append(line, '\n')); err != nil {
			log.Print(err)
		}
	}
	// A reset may have cut the last line.
	if _, err := port.WriteString("\n"); err != nil {
		return fmt.Errorf("begin: %w", err)
	}
	send(answer{})
	for in := bufio.NewReader(port); ; {
		line, err := in.ReadBytes('\n')
		if errors.Is(err, io.EOF) { // nobody is at the other end yet
			time.Sleep(100 * time.Millisecond)
			continue
		}
		if err != nil {
			return fmt.Errorf("read the port: %w", err)
		}
		var r request
		if err := json.Unmarshal(line, &r); err != nil || len(r.Args) == 0 {
			log.Printf("%q: %v", line, err)
			continue
		}
		go func() { send(run(r)) }()
	}
}

func run(r request) answer {
	ctx, cancel := context.WithTimeout(context.Background(), time.Duration(r.Seconds)*time.Second)
	defer cancel()
	cmd := exec.CommandContext(ctx, r.Args[0], r.Args[1:]...)
	cmd.Env = []string{"PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin", "LC_ALL=C",
		"HOME=/root", "DEBIAN_FRONTEND=noninteractive"}
	cmd.Stdin = bytes.NewReader([]byte(r.Stdin))
	cmd.WaitDelay = time.Second // what it left running has its output
	out, err := cmd.CombinedOutput()
	a := answer{ID: r.ID, Out: string(out)}
	if err != nil && !errors.Is(err, exec.ErrWaitDelay) {
		a.Code, a.Err = -1, err.Error()
		var exit *exec.ExitError
		if errors.As(err, &exit) {
			a.Code = exit.ExitCode()
		}
	}
	return a
}
