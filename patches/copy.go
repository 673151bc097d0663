package patches

import (
	"encoding/json"
	"os"
	"os/exec"
)

// Copy downloads the line's release as a Go module, with its checksum verified, and copies it into dir, which it makes.
func (l Line) Copy(dir string) error {
	out, err := output(exec.Command("go", "mod", "download", "-json", l.Module+"@"+l.Version))
	if err != nil {
		return err
	}
	var module struct{ Dir string }
	if err = json.Unmarshal(out, &module); err != nil {
		return err
	}
	return os.CopyFS(dir, os.DirFS(module.Dir)) // which makes writable what the module cache protects
}
