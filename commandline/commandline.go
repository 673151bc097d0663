// Package commandline refuses command lines that Go's flag package accepts although it ignores a part of them.
package commandline

import (
	"flag"
	"fmt"
)

// NoArguments returns an error if there is an argument that is not a flag. The flag package stops at the first one: that argument and the
// flags behind it have no effect. The hint says what the argument may have been meant for.
func NoArguments(flags *flag.FlagSet, hint string) error {
	if flags.NArg() == 0 {
		return nil
	}
	arg := flags.Arg(0)
	switch {
	case arg == "true" || arg == "false":
		hint = "a switch takes its value with an equals sign, as in --switch=" + arg
	case flags.Lookup(arg) != nil:
		hint = "did you mean --" + arg + "?"
	}
	return fmt.Errorf("unexpected argument %q; flags after it would be ignored: %s", arg, hint)
}
