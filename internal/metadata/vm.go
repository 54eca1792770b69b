package metadata

import (
	"context"
	"errors"
	"net/http"
	"path"
	"strings"
	"sync"
	"time"
)

// VM is who the VM is. It cannot change while the VM runs.
type VM struct {
	Name, Zone    string // zone as in europe-west1-b
	Project       string // its ID
	ProjectNumber string
	Network       string // of the first interface, by name
	// NetworkProject is the number of the project that the network belongs to: the host project's, of
	// a shared VPC.
	NetworkProject string
}

// ReadVM asks who the VM is, all at once: a slow server is waited for once. Errors: [*Error].
func ReadVM(ctx context.Context) (VM, error) {
	var vm VM
	questions := []struct {
		path string
		take func(text string)
	}{
		{"instance/name", func(s string) { vm.Name = s }},
		{"instance/zone", func(s string) { vm.Zone = path.Base(s) }}, // projects/N/zones/Z
		{"project/project-id", func(s string) { vm.Project = s }},
		{"project/numeric-project-id", func(s string) { vm.ProjectNumber = s }},
		{"instance/network-interfaces/0/network", func(s string) { // projects/N/networks/X
			vm.Network = path.Base(s)
			if parts := strings.Split(s, "/"); len(parts) == 4 && parts[0] == "projects" {
				vm.NetworkProject = parts[1]
			}
		}},
	}
	texts, errs := make([][]byte, len(questions)), make([]error, len(questions))
	var asked sync.WaitGroup
	for i, q := range questions {
		asked.Go(func() { texts[i], errs[i] = Read(ctx, q.path) })
	}
	asked.Wait()
	for i, q := range questions {
		if errs[i] != nil {
			return VM{}, errs[i]
		}
		if s := strings.TrimSpace(string(texts[i])); s != "" {
			q.take(s)
		}
	}
	return vm, nil
}

// errNoDate is the error of an answer that does not tell the time, or came too late to.
var errNoDate = errors.New("its answer does not tell the time")

// Clock asks how far this machine's clock is ahead of the metadata server's; behind is negative.
// The server tells whole seconds: what is below two of them is zero. Errors: [*Error].
func Clock(ctx context.Context) (ahead time.Duration, err error) {
	// Not an answer that the server was waited for with: nothing says whether its Date is of the
	// beginning or of the end of that.
	const path = "instance/id"
	answer := &answer{}
	if _, err := ask(ctx, path, "", pace{}, answer); err != nil {
		return 0, err
	}
	if !answer.dated {
		return 0, &Error{Path: path, Err: errNoDate}
	}
	return answer.ahead, nil
}

const (
	// slowest is how long an answer may take whose Date is of use.
	slowest = 2 * time.Second
	// exact is the least offset that the Date's whole seconds and such an answer can tell.
	exact = 2 * time.Second
)

// offset is how far this machine's clock is ahead by an answer's Date: it was made in the middle
// between the question and the answer.
func offset(sent, received time.Time, date string) (ahead time.Duration, known bool) {
	took := received.Sub(sent) // by the monotonic clock
	at, err := http.ParseTime(date)
	if err != nil || took > slowest {
		return 0, false
	}
	// The wall clock as it was last read: it may have been set since the question.
	middle := received.Round(0).Add(-took / 2)
	ahead = middle.Sub(at.Add(time.Second / 2)) // Date leaves out what is beyond the second
	if ahead.Abs() < exact {
		return 0, true
	}
	return ahead.Round(time.Second), true
}
