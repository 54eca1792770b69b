package iptables

import (
	"context"
	"errors"
	"fmt"
	"strconv"
	"strings"

	goiptables "github.com/coreos/go-iptables/iptables"
)

// goTables is coreos/go-iptables on one program, by its path. A lock that is held ends what it runs
// after lockWait.
func goTables(path string, f Family) (*goiptables.IPTables, error) {
	protocol := goiptables.ProtocolIPv4
	if f == IPv6 {
		protocol = goiptables.ProtocolIPv6
	}
	seconds, _ := strconv.Atoi(lockWait) // it is a number
	tables, err := goiptables.New(goiptables.IPFamily(protocol), goiptables.Path(path),
		goiptables.Timeout(seconds))
	if err != nil {
		return nil, fmt.Errorf("ask %s for its version: %w", path, err)
	}
	return tables, nil
}

// fromGo is an error of go-iptables in the classes of this package.
func fromGo(command string, err error) error {
	var failed *goiptables.Error
	if !errors.As(err, &failed) {
		return err
	}
	_, text, _ := strings.Cut(failed.Error(), ": ") // without the whole command line
	return classify(command, failed.ExitStatus(), text)
}

// aside asks beside the caller, who has a time limit where go-iptables takes none: what does not
// answer in time is left behind, which only a command that ends soon can afford.
func aside[T any](ctx context.Context, ask func() (T, error)) (T, error) {
	type answer struct {
		got T
		err error
	}
	answers := make(chan answer, 1)
	go func() {
		got, err := ask()
		answers <- answer{got, err}
	}()
	select {
	case a := <-answers:
		return a.got, a.err
	case <-ctx.Done():
		var none T
		return none, fmt.Errorf("%w: %w", ErrCouldNotLook, ctx.Err())
	}
}
