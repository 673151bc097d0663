package msc4140

import (
	"bytes"
	"encoding/json"
	"go/ast"
	"go/parser"
	"go/token"
	"io/fs"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"

	"github.com/stretchr/testify/require"
)

// world is a set of foreign packages, or several of these sets.
type world int

const (
	dendrite   world = 1 << iota // Dendrite, beside this module
	matrix                       // gomatrixserverlib and util: events, and Matrix errors
	web                          // net/http, and a router
	everything = dendrite | matrix | web
)

// arrows has a row for each package: the packages of this module that it may import, and the worlds that it may import from. "x/..." means
// all packages below x. A package without a row has the row of the nearest folder above it. Tests and programs may import everything, and
// no package imports them.
var arrows = map[string]struct {
	own    []string
	worlds world
}{
	"": {[]string{ // the root package joins everything
		"around", "clientapi", "config", "dendritefix", "expiration", "expiration/storage", "inputqueue", "roomserver", "rtc", "rtc/keeper",
		"rtc/livekit",
		"summary", "syncapi", "syncapi/delayid", "syncapi/stateafter", "userapi",
	}, dendrite | web},

	// The engine imports nothing of Dendrite, Matrix or HTTP.
	"expiration": {[]string{"expiration/internal/...", "failpoint", "guard", "keylock"}, 0},
	// The storage uses Dendrite's helpers for opening databases, prepared statements.
	"expiration/storage": {[]string{"expiration", "expiration/storage/...", "guard"}, dendrite},

	// The adapters connect the engine to Dendrite, and do not import one another.
	"clientapi":  {[]string{"dendritefix", "eventsize", "expiration", "failpoint", "jsondepth", "limits", "webapi"}, everything},
	"roomserver": {[]string{"dendritefix", "eventsize", "expiration", "failpoint", "inputqueue", "keylock"}, everything},
	"syncapi":    {[]string{"dendritefix", "expiration", "failpoint", "guard"}, dendrite | matrix},
	"userapi":    {nil, dendrite | matrix},
	// Package delayid asks for an interface of its own, and needs none of our packages.
	"syncapi/delayid": {nil, dendrite | web},

	// The configuration fills the configurations of these packages.
	"config": {[]string{"clientapi", "expiration", "rtc", "rtc/livekit"}, dendrite | matrix},

	// Other MSCs, and fixes for Dendrite, have nothing to do with timers.
	"syncapi/stateafter": {[]string{"around"}, everything},
	"rtc":                {[]string{"around", "guard", "limits", "rtc/livekit", "webapi"}, everything},
	"rtc/livekit":        {nil, matrix | web}, // of Matrix only canonical JSON
	"rtc/keeper":         {[]string{"expiration", "failpoint", "guard", "keylock", "rtc/livekit"}, 0},
	"summary":            {[]string{"limits"}, everything},
	"dendritefix":        {[]string{"guard", "inputqueue", "jsondepth"}, everything},

	// Shared helpers.
	"around":      {nil, everything},
	"commandline": {nil, 0},
	"eventsize":   {nil, matrix},
	"failpoint":   {nil, 0},
	"guard":       {nil, 0},
	"inputqueue":  {nil, dendrite | matrix},
	"jsondepth":   {nil, 0},
	"keylock":     {nil, 0},
	// Request limits use the token bucket of the engine, expiration.RateLimit.
	"limits": {[]string{"expiration", "keylock"}, everything},
	"webapi": {[]string{"limits"}, everything},
}

// matrixInEngine are the exceptions to the rule that the engine has no HTTP status and no Matrix JSON. The first is how an
// expiration.RefusedError, which carries Dendrite's answer, is logged. The second is how an event is found among the prev events of a
// signed event.
var matrixInEngine = []string{`"HTTP %d: %s"`, `"prev_events"`}

// outside are the folders of tests and programs.
var outside = []string{"cmd", "docker", "docs", "patches", "test"}

// module is the path of this module; a package's name in the tables is its path below that.
const module = "github.com/matrix-org/dendrite/setup/mscs/msc4140"

// within reports whether a package is one of the given folders, or lies below one of them.
func within(pkg string, folders []string) bool {
	return slices.ContainsFunc(folders, func(folder string) bool { return pkg == folder || strings.HasPrefix(pkg, folder+"/") })
}

func worldOf(path string) world {
	is := func(prefixes ...string) bool { return within(path, prefixes) }
	switch {
	case is("github.com/matrix-org/dendrite"):
		return dendrite
	case is("github.com/matrix-org/gomatrixserverlib", "github.com/matrix-org/gomatrix", "github.com/matrix-org/util"):
		return matrix
	case is("net/http", "github.com/gorilla"):
		return web
	}
	return 0
}

// allows returns the entry of a list that allows a package, or "".
func allows(own []string, pkg string) string {
	i := slices.IndexFunc(own, func(entry string) bool {
		below, all := strings.CutSuffix(entry, "/...")
		return pkg == entry || all && strings.HasPrefix(pkg, below+"/")
	})
	if i < 0 {
		return ""
	}
	return own[i]
}

// A package imports only what its row allows, and a row allows only what is imported.
func TestArrows(t *testing.T) {
	out, err := exec.Command("go", "list", "-json=ImportPath,Imports", "./...").Output()
	require.NoError(t, err)
	used, usedWorlds := map[string][]string{}, map[string]world{}
	for packages := json.NewDecoder(bytes.NewReader(out)); packages.More(); {
		var p struct {
			ImportPath string
			Imports    []string
		}
		require.NoError(t, packages.Decode(&p))
		name := strings.TrimPrefix(strings.TrimPrefix(p.ImportPath, module), "/")
		if within(name, outside) {
			continue
		}
		folder := name
		row, ok := arrows[folder]
		for !ok && strings.Contains(folder, "/") {
			folder = folder[:strings.LastIndexByte(folder, '/')]
			row, ok = arrows[folder]
		}
		if !ok {
			t.Errorf("%s has no row in the table of arrows", name)
			continue
		}
		for _, path := range p.Imports {
			if path == module || strings.HasPrefix(path, module+"/") {
				to := strings.TrimPrefix(strings.TrimPrefix(path, module), "/")
				entry := allows(row.own, to)
				if entry == "" {
					t.Errorf("%s must not import %s", name, to)
				}
				used[folder] = append(used[folder], entry)
				continue
			}
			if worldOf(path)&^row.worlds != 0 {
				t.Errorf("%s must not import %s", name, path)
			}
			usedWorlds[folder] |= worldOf(path)
		}
	}
	for name, row := range arrows {
		for _, entry := range row.own {
			if !slices.Contains(used[name], entry) {
				t.Errorf("%q may import %s, and does not: take it out of its row", name, entry)
			}
		}
		if unused := row.worlds &^ usedWorlds[name]; unused != 0 {
			t.Errorf("%q may import from the worlds %03b, and does not: take them out of its row", name, unused)
		}
	}
}

var ofMatrix = regexp.MustCompile(`errcode|HTTP|\bM_[A-Z]|(prev|auth)_events`)

// The engine has no HTTP status and no Matrix JSON, except for the listed exceptions.
func TestNoMatrixInEngine(t *testing.T) {
	found := map[string]bool{}
	require.NoError(t, filepath.WalkDir("expiration", func(path string, entry fs.DirEntry, err error) error {
		switch {
		case err != nil:
			return err
		case entry.IsDir() && path == filepath.Join("expiration", "storage"):
			return filepath.SkipDir
		case filepath.Ext(path) != ".go" || strings.HasSuffix(path, "_test.go"):
			return nil
		}
		file, err := parser.ParseFile(token.NewFileSet(), path, nil, parser.SkipObjectResolution)
		if err != nil {
			return err
		}
		ast.Inspect(file, func(n ast.Node) bool {
			switch n := n.(type) {
			case *ast.ImportSpec:
				return false
			case *ast.KeyValueExpr:
				key, _ := n.Key.(*ast.Ident)
				if code, ok := n.Value.(*ast.BasicLit); ok && key != nil && key.Name == "Code" {
					found["Code: "+code.Value] = true
				}
			case *ast.BasicLit:
				if n.Kind == token.STRING && ofMatrix.MatchString(n.Value) {
					found[n.Value] = true
				}
			}
			return true
		})
		return nil
	}))
	for what := range found {
		if !slices.Contains(matrixInEngine, what) {
			t.Errorf("expiration/ has %s, which belongs to an adapter", what)
		}
	}
	for _, what := range matrixInEngine {
		if !found[what] {
			t.Errorf("expiration/ has %s no more: take it out of the list", what)
		}
	}
}
