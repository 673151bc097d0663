package main

import (
	"errors"
	"flag"
	"net"
	"os"

	"github.com/matrix-org/dendrite/setup/mscs/msc4140/commandline"
)

// checkArguments refuses a command line if a part of it would have no effect. Otherwise the server would start in another place than
// intended.
func checkArguments(flags *flag.FlagSet) error {
	arg := flags.Arg(0)
	hint := "did you mean --config " + arg + "?"
	if info, err := os.Stat(arg); err == nil && info.IsDir() {
		hint = "did you mean --data " + arg + "?"
	} else if _, _, err := net.SplitHostPort(arg); err == nil {
		hint = "did you mean --http-bind-address " + arg + "?"
	}
	if err := commandline.NoArguments(flags, hint); err != nil {
		return err
	}
	value := func(name string) string { return flags.Lookup(name).Value.String() }
	switch {
	case value("data") == "":
		return errors.New("--data is empty: name a folder")
	case (value("tls-cert") == "") != (value("tls-key") == ""):
		return errors.New("--tls-cert and --tls-key need each other: with one of them there would be no HTTPS")
	}
	return nil
}
