package config

import (
	"fmt"
	"regexp"
	"slices"
	"strconv"
	"strings"

	"github.com/matrix-org/dendrite/setup/config"
	"gopkg.in/yaml.v2"

	"github.com/matrix-org/dendrite/setup/mscs/msc4140/rtc"
)

// These are the errors of gopkg.in/yaml.v2. They name Go's types.
var (
	unknownKey = regexp.MustCompile(`^line (\d+): field (.*) not found in type (\S+)$`)
	keyTwice   = regexp.MustCompile(`^line (\d+): field (.*) already set in type \S+$`)
	wrongKind  = regexp.MustCompile("(?s)^line (\\d+): cannot unmarshal !!(\\w+)(?: `(.*)`)? into (\\S+)$")
)

// explain translates an error of the YAML library, which names Go's types, into the terms of dendrite.yaml. It returns "" if the key
// belongs to Dendrite, because that is no error.
func explain(text string, lines []string) string {
	if m := unknownKey.FindStringSubmatch(text); m != nil {
		line, key, section := m[1], m[2], m[3]
		if section == fmt.Sprintf("%T", sections{}) {
			if meant := nearest(key); meant != "" {
				return fmt.Sprintf("line %s: unknown config key %q (did you mean %q?)", line, key, meant)
			}
			return ""
		}
		return fmt.Sprintf("line %s: unknown config key %q (the keys there are %s)", line, key, strings.Join(keysOf(section), ", "))
	}
	if m := keyTwice.FindStringSubmatch(text); m != nil {
		return fmt.Sprintf("line %s: config key %q is there for the second time", m[1], m[2])
	}
	if m := wrongKind.FindStringSubmatch(text); m != nil {
		line, value, goType := m[1], m[3], m[4]
		begins, shown := regexp.QuoteMeta(value)+`["']?\s*(?:[],}#]|$)`, value
		switch {
		case m[2] == "seq":
			begins, shown = `\[`, "a list"
		case m[2] == "map":
			begins, shown = `\{`, "a section"
		case strings.HasSuffix(value, "..."): // the library cuts long values off
			begins = regexp.QuoteMeta(strings.TrimSuffix(value, "..."))
		}
		return fmt.Sprintf("line %s: invalid value for config key %q: %s (must be %s)", line, keyAt(lines, line, begins), shown, kind(goType))
	}
	return text
}

// keyAt returns the key of the value that begins in the given line and matches the pattern begins. The key may stand in a line above, and
// other keys may stand in the same line. If several keys have such a value, keyAt returns all of them.
func keyAt(lines []string, line, begins string) string {
	pattern := regexp.MustCompile(`([\w-]+)["']?\s*:(?:[\s["'!&-]*` + begins + `|\s*(?:#.*)?$)`)
	n, _ := strconv.Atoi(line)
	for _, text := range slices.Backward(lines[:min(n, len(lines))]) {
		var keys []string
		for _, match := range pattern.FindAllStringSubmatch(text, -1) {
			keys = append(keys, match[1])
		}
		if len(keys) > 0 {
			return strings.Join(slices.Compact(keys), " or ")
		}
	}
	return ""
}

// kind describes the values of a Go type as they are written in dendrite.yaml.
func kind(goType string) string {
	switch goType {
	case "config.noDuration":
		return "a duration with its unit, such as 3600s or 1h"
	case "bool":
		return "true or false"
	case "int", "int64":
		return "a whole number"
	case "string", "config.DataSource", "livekit.Secret":
		return "text"
	case "[]string":
		return "a list of texts"
	case "[]rtc.Transport":
		return "a list of sections"
	}
	return "a section with keys of its own"
}

// keysOf returns the keys of the section that has this Go type.
func keysOf(goType string) []string {
	for _, section := range []any{
		Config{}, config.DatabaseOptions{}, DelayedEvents{}, RateLimiting{}, RateLimit{}, MatrixRTC{}, LiveKit{}, rtc.Transport{},
	} {
		if fmt.Sprintf("%T", section) == goType {
			text, _ := yaml.Marshal(section)
			return regexp.MustCompile(`(?m)^\w+`).FindAllString(string(text), -1)
		}
	}
	return nil
}
