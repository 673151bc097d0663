package main

import (
	"fmt"
	"runtime/debug"

	"github.com/matrix-org/dendrite/internal"

	"github.com/matrix-org/dendrite/setup/mscs/msc4140"
)

// version returns our version, Dendrite's version, and the commit if the binary was built in a checkout. Dendrite's own version string
// would present our commit as Dendrite's.
func version() string {
	v := fmt.Sprintf("%s (Dendrite %d.%d.%d)", msc4140.Version, internal.VersionMajor, internal.VersionMinor, internal.VersionPatch)
	info, ok := debug.ReadBuildInfo()
	if !ok {
		return v
	}
	settings := map[string]string{}
	for _, setting := range info.Settings {
		settings[setting.Key] = setting.Value
	}
	if commit := settings["vcs.revision"]; commit != "" {
		v += ", commit " + commit
	}
	if settings["vcs.modified"] == "true" {
		v += ", modified"
	}
	return v
}
