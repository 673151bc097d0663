// Command complement runs a package of Complement's tests against a homeserver's binary, without Docker. README.md shows how.
//
// Complement's packages run unchanged, except for one file. All of them deploy their servers with Complement's test_main.go, which the
// compiler replaces by _overlay/test_main.go. That file uses package deployer, which explains the rest.
package main

import (
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"

	"github.com/matrix-org/dendrite/setup/mscs/msc4140/test/complement/deployer"
)

const (
	module     = "github.com/matrix-org/dendrite/setup/mscs/msc4140/test/complement"
	complement = "github.com/matrix-org/complement"
)

func main() {
	homeserver := flag.String("homeserver", "", "the `binary` of the homeserver")
	flag.Usage = func() {
		fmt.Fprintln(flag.CommandLine.Output(), "usage: go run . -homeserver BINARY PACKAGE [FLAG OF GO TEST]...")
		flag.PrintDefaults()
	}
	flag.Parse()
	if *homeserver == "" || flag.NArg() == 0 {
		flag.Usage()
		os.Exit(2)
	}
	err := run(*homeserver, flag.Arg(0), flag.Args()[1:])
	if failed, ok := errors.AsType[*exec.ExitError](err); ok {
		os.Exit(failed.ExitCode())
	}
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
}

func run(homeserver, pkg string, flags []string) error {
	homeserver, err := filepath.Abs(homeserver)
	if err != nil {
		return err
	}
	// The files of servers and tests stay if a test failed. Complement also has files there, which two runs must not share.
	dir, err := os.MkdirTemp("", "complement-")
	if err != nil {
		return err
	}
	overlay := filepath.Join(dir, "overlay.json")
	if err = writeOverlay(overlay); err != nil {
		return err
	}
	args := []string{"test", "-overlay", overlay, "-exec", deployer.Namespaces, "-tags", "dendrite_blacklist", "-count", "1"}
	cmd := exec.Command("go", append(append(args, flags...), pkg)...)
	cmd.Env = append(os.Environ(), "COMPLEMENT_BASE_IMAGE="+homeserver, "TMPDIR="+dir)
	cmd.Stdout, cmd.Stderr = os.Stdout, os.Stderr
	if err = cmd.Run(); err != nil {
		return err
	}
	return os.RemoveAll(dir)
}

// writeOverlay writes the file that tells the compiler which file to replace.
func writeOverlay(name string) error {
	original, err := moduleDir(complement)
	if err != nil {
		return err
	}
	ours, err := moduleDir(module)
	if err != nil {
		return err
	}
	data, err := json.Marshal(map[string]any{"Replace": map[string]string{
		filepath.Join(original, "test_main.go"): filepath.Join(ours, "_overlay", "test_main.go"),
	}})
	if err != nil {
		return err
	}
	return os.WriteFile(name, data, 0o600)
}

// moduleDir returns the folder of a module of the workspace.
func moduleDir(name string) (string, error) {
	out, err := exec.Command("go", "list", "-m", "-f", "{{.Dir}}", name).Output()
	if err != nil {
		return "", fmt.Errorf("no module %s: %w", name, err)
	}
	return strings.TrimSpace(string(out)), nil
}
