// Command dendrite is the Dendrite homeserver with expiring and delayed events (MSC4140, the 2024 draft and as merged).
//
// With --config, or a dendrite.yaml in the current folder, it takes the flags of Dendrite's own command and behaves like it. With neither
// it keeps everything in a data folder, which it creates at the first start.
package main

import (
	"errors"
	"flag"
	"fmt"
	"os"
	"runtime"
	"strings"

	"github.com/matrix-org/dendrite/setup"
	"github.com/matrix-org/dendrite/setup/config"
	"github.com/sirupsen/logrus"

	msc4140config "github.com/matrix-org/dendrite/setup/mscs/msc4140/config"
)

var (
	unixSocket           = flag.String("unix-socket", "", "The unix socket on which to listen for HTTP, instead of an address (experimental)")
	unixSocketPermission = flag.String("unix-socket-permission", "755", "The permissions of the unix socket, as for chmod (experimental)")
	httpBindAddr         = flag.String("http-bind-address", ":8008", "The address on which to listen for HTTP; 127.0.0.1:8008 with a data folder")
	httpsBindAddr        = flag.String("https-bind-address", ":8448", "The address on which to listen for HTTPS, if there is a certificate")
	certFile             = flag.String("tls-cert", "", "The PEM file with the X.509 certificate for HTTPS")
	keyFile              = flag.String("tls-key", "", "The PEM file with the private key for HTTPS")
	dataDir              = flag.String("data", "data", "The folder for configuration, key and databases, if no configuration file is named")
)

func main() {
	flag.Parse()
	if err := checkArguments(flag.CommandLine); err != nil {
		fail(err)
	}
	if flag.Lookup("version").Value.String() == "true" {
		fmt.Println(version())
		return
	}
	h, err := openHome()
	if err != nil {
		fail(err)
	}
	// ParseFlags parses the flags once more and loads the configuration. If that fails, it prints a line and exits.
	cfg := setup.ParseFlags(true)
	if err = run(cfg, h); err != nil {
		fail(err)
	}
}

// fail ends the process with one clear line.
func fail(err error) {
	if !errors.Is(err, errLogged) {
		fmt.Fprintln(os.Stderr, "dendrite:", err)
	}
	os.Exit(1)
}

func run(cfg *config.Dendrite, h *home) error {
	var errs config.ConfigErrors
	if cfg.Verify(&errs); len(errs) > 0 {
		return fmt.Errorf("configuration error: %s", strings.Join(errs, "; "))
	}
	extension, err := msc4140config.Load(flag.Lookup("config").Value.String(), cfg)
	if err != nil {
		return fmt.Errorf("configuration error: %w", err)
	}
	listen, err := listenAddresses()
	if err != nil {
		return err
	}
	unlock, err := preflight(cfg, extension, listen)
	if err != nil {
		return err
	}
	defer unlock()
	if h != nil {
		fmt.Printf("Starting Dendrite with the data in %s\n", h.dir)
	}
	addProcessors(cfg)
	s, err := build(cfg, extension, h)
	if err != nil {
		return err
	}
	return s.serve(listen, h)
}

// errLogged is an error that Dendrite has already logged.
var errLogged = errors.New("see the log")

// asError returns an error for the ways in which Dendrite's components give up at the start. Any other panic goes on, with its stack.
func asError(panicked any) error {
	switch p := panicked.(type) {
	case nil:
		return nil
	case *logrus.Entry:
		return errLogged
	case runtime.Error:
		panic(p)
	case error:
		return p
	}
	panic(panicked)
}
