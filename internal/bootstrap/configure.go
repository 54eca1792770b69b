package bootstrap

import (
	"bytes"
	"context"
	"fmt"
	"os"
	"path/filepath"
	"syscall"
	"time"

	"github.com/service-proxy-agent/service-proxy-agent/internal/atomicfile"
	"github.com/service-proxy-agent/service-proxy-agent/internal/attribute"
	"github.com/service-proxy-agent/service-proxy-agent/internal/authorities"
	"github.com/service-proxy-agent/service-proxy-agent/internal/progress"
)

// configureEnvoy writes Envoy's configuration when it has changed and Envoy accepts it.
func (b *bootstrapper) configureEnvoy(ctx context.Context, cfg attribute.Config, vm VM) error {
	node, err := envoyNode(cfg, vm)
	if err != nil {
		return err
	}
	text, err := envoyConfig(cfg, vm, authorities.File(b.Root))
	if err != nil {
		return err
	}
	wrote := &progress.EnvoyConfig{File: EnvoyConfig, Node: node.Id,
		Targets: []string{trafficDirector}}
	target := b.path(EnvoyConfig)
	have, err := os.ReadFile(target)
	same := err == nil && bytes.Equal(have, text)
	_, restart := os.Lstat(b.path(restartFile))
	if same && restart != nil {
		b.state.Envoy = wrote
		return nil // and this Envoy has accepted it before
	}
	if err := os.MkdirAll(filepath.Dir(target), 0o755); err != nil {
		return err
	}
	temp := b.path(newConfig)
	defer os.Remove(temp)
	if err := writeNew(temp, text, 0o640); err != nil {
		return err
	}
	if err := b.letEnvoyRead(temp); err != nil {
		return err
	}
	as, err := b.envoyCredential()
	if err != nil {
		return err
	}
	if err := b.validate(ctx, as, b.path(EnvoyBinary), temp); err != nil {
		err = fmt.Errorf("Envoy %s refuses its configuration: %w", b.state.EnvoyVersion, err)
		return &Failure{Err: err, Permanent: true,
			Advice: "install another Envoy by primary-source, or report this"}
	}
	if same {
		b.state.Envoy = wrote
		return nil
	}
	if err := b.markRestart(); err != nil {
		return err
	}
	if err := os.Rename(temp, target); err != nil {
		return err
	}
	b.state.Envoy = wrote
	b.say("INFO", "wrote Envoy's configuration, node "+"projects/"+vm.ProjectNumber+"/…/"+vm.Name)
	return nil
}

// validate has this Envoy say whether it takes this configuration.
func (b *bootstrapper) validate(
	ctx context.Context, as *syscall.Credential, binary, config string,
) error {
	out, err := b.execAs(ctx, time.Minute, as, binary,
		"--mode", "validate", "-l", "error", "-c", config)
	if err != nil {
		return said(err, out)
	}
	return nil
}

// letEnvoyRead makes a file of ours root:envoy.
func (b *bootstrapper) letEnvoyRead(name string) error {
	if b.Root != "" {
		return nil
	}
	_, gid, err := lookup(EnvoyUser)
	if err != nil {
		return err
	}
	return os.Lchown(name, 0, gid)
}

// markUnitChanged remembers, before the change, that Envoy's unit is not what it was started
// as, and why.
func (b *bootstrapper) markUnitChanged(why string) error {
	return atomicfile.Write(b.path(unitChangedFile), []byte(why+"\n"), 0o600)
}

// markRestart remembers, before the change, that the Envoy that runs is not what is installed: a
// run that is cut short is made good by the next.
func (b *bootstrapper) markRestart() error {
	return atomicfile.Write(b.path(restartFile), nil, 0o600)
}
